"""`m1 bench`: what is measured against what a user would take instead. Tables on stderr, JSON lines on stdout."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Measure against what a user would take instead.", no_args_is_help=True)

QuickOption = Annotated[bool, typer.Option("--quick", help="A smaller set, in under a minute.")]


@app.callback()
def _group() -> None:
    """Measure against what a user would take instead."""


@app.command()
def sandbox(
    quick: QuickOption = False,
    image: Annotated[str | None, typer.Option(help="Environment with pytest; default the newest.")] = None,
    runtime: Annotated[str | None, typer.Option(help="Runtime class: runc, runsc, kata, ...")] = None,
) -> None:
    """Warm pool against a container per job; overhead over bare execution."""
    from infra.sandbox import bench

    options = ["--quick"] * quick + (["--image", image] if image else []) + (["--runtime", runtime] if runtime else [])
    bench.main(options)
