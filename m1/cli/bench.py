"""`m1 bench`: what is measured against what a user would take instead. Tables on stderr, JSON lines on stdout."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

app = typer.Typer(help="Measure against what a user would take instead.", no_args_is_help=True)

QuickOption = Annotated[bool, typer.Option("--quick", help="A smaller set, in about a minute.")]


@app.command()
def kernels(quick: QuickOption = False) -> None:
    """Lightning attention against transformers' block loop and softmax; python -m kernels.bench has more."""
    from kernels import bench

    bench.main(["--quick"] if quick else [])


@app.command()
def train(
    profile: Annotated[str, typer.Option("--profile", "-p", help="Name of a file in profiles/.")] = "tiny",
    length: Annotated[list[int] | None, typer.Option(min=16, help="Sequence length; may be repeated.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16; default the profile's.")] = None,
    quick: QuickOption = False,
) -> None:
    """A training step against plain transformers on the same weights, batches and cores."""
    from flows import plan as planning
    from m1.errors import UsageError
    from m1.training import bench

    if precision not in (None, "fp32", "bf16"):
        raise UsageError(f"precision={precision!r} is not known", "Choose fp32 or bf16.")
    chosen: Literal["fp32", "bf16"] | None = precision  # type: ignore[assignment]
    bench.bench(planning.load_profile(profile), lengths=length or bench.LENGTHS, quick=quick, precision=chosen)


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
