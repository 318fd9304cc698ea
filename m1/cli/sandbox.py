"""`m1 sandbox`: images, leftovers, the state of the engine, and attacks on it."""

from __future__ import annotations

from typing import Annotated

import typer

from m1.cli.console import show
from m1.cli.tables import table

app = typer.Typer(help="The sandbox: images, leftovers, state of the engine.", no_args_is_help=True)


@app.command()
def build(
    environment: Annotated[
        str | None, typer.Option("--env", help="Task environment to build on the base: image m1-swe-ENV.")
    ] = None,
    requirement: Annotated[
        list[str] | None,
        typer.Option("--requirement", "-r", help="name==version; may be given several times. Default: pytest."),
    ] = None,
    base: Annotated[
        str, typer.Option(help="debootstrap, host-python (a copy of this Python), or the name of a given image.")
    ] = "debootstrap",
    mirror: Annotated[str | None, typer.Option(help="Debian mirror for debootstrap.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again although it is there.")] = False,
) -> None:
    """Build the base image and a task environment (`python`, with pytest, unless told otherwise)."""
    from infra.sandbox import images

    tag = images.build_base(base, mirror=mirror or images.MIRROR, force=force)
    typer.echo(tag)
    requirements = requirement or list(images.DEFAULT_REQUIREMENTS)
    typer.echo(images.build_environment(environment or "python", requirements, base=tag, force=force))


@app.command(name="images")
def images_command() -> None:
    """List the images of the sandbox."""
    from infra.sandbox.images import list_images

    made = table(None, "image", "size", "made", "packages", right=("size",))
    for image in list_images():
        made.add_row(image.tag, f"{image.size / 1e6:.0f} MB", image.created, " ".join(image.packages) or "-")
    show(made)


@app.command()
def reap() -> None:
    """Remove containers whose runner is dead."""
    from infra.sandbox import engine

    typer.echo(f"{engine.reap()} containers removed")


@app.command()
def check(
    image: Annotated[str | None, typer.Option(help="Image for the trial job; default the newest environment.")] = None,
    runtime: Annotated[str | None, typer.Option(help="Runtime class: runc, runsc, kata, ...")] = None,
) -> None:
    """Show what the engine can do, and run one job that looks at its own cage."""
    from infra.sandbox.check import check_sandbox

    rows, good = check_sandbox(image, runtime)
    made = table(None, "what", "state", "found")
    for row in rows:
        made.add_row(*row)
    show(made)
    raise typer.Exit(0 if good else 1)


@app.command()
def attack(
    image: Annotated[str | None, typer.Option(help="Environment with pytest; default the newest.")] = None,
    runtime: Annotated[str | None, typer.Option(help="Runtime class: runc, runsc, kata, ...")] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(help="job, text, forgery, written-test, informed; may be given several times. Default: all."),
    ] = None,
    name: Annotated[str, typer.Option(help="Only attacks with this word in their name.")] = "",
    repeat: Annotated[int, typer.Option(min=1, help="How often each attack is tried.")] = 1,
) -> None:
    """Attack the configured engine: host, limits, judge, rewards. Ends with 1 if an attack is not contained.

    Informed attacks are written against this very program; they are shown, and do not count.
    """
    from infra.sandbox.attacks import suite
    from infra.sandbox.check import newest_with_pytest
    from infra.sandbox.runner import Sandbox

    chosen = suite.chosen(group, name)
    made = table(None, "attack", "contained", "verdict", "seconds", "next job", right=("contained", "seconds"))
    lost = 0
    with Sandbox(image or newest_with_pytest(), runtime, warm=2, limits=suite.LIMITS) as sandbox:
        for wrong in suite.honest(sandbox):
            typer.echo(f"an honest answer is not judged right: {wrong}", err=True)
            lost += 1
        for number, each in enumerate(chosen, 1):
            found = [suite.finding(sandbox, each) for _ in range(repeat)]
            held = sum(one.contained for one in found)
            well = all(one.next_job for one in found)
            lost += not well or (held < repeat and each.group != "informed")
            typer.echo(f"{number} of {len(chosen)}: {each.group}: {each.name}: {held} of {repeat}", err=True)
            last = next((one for one in found if not one.contained), found[-1])
            longest = max(one.seconds for one in found)
            cells = (f"{held}/{repeat}", last.verdict[:60], f"{longest:.1f}", "right" if well else "WRONG")
            made.add_row(f"{each.group}: {each.name}", *cells)
    show(made)
    raise typer.Exit(1 if lost else 0)
