"""The commands and their options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from m1.cli import bench, sandbox
from m1.cli.console import show
from m1.config.reading import parse_value
from m1.errors import UsageError

app = typer.Typer(
    name="m1",
    help="The MiniMax-M1 training recipe: run it, look at it, change it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench.app, name="bench")
app.add_typer(sandbox.app, name="sandbox")

ProfileOption = Annotated[str, typer.Option("--profile", "-p", help="Name of a file in profiles/.")]
StartOption = Annotated[str | None, typer.Option(help="First stage; default the first of the order.")]
StopOption = Annotated[str | None, typer.Option(help="Last stage; default the last of the order.")]
OnlyOption = Annotated[list[str] | None, typer.Option(help="Exactly this stage; may be given several times.")]
UpstreamOption = Annotated[
    str | None,
    typer.Option(help="What the first stage starts from: run folder, fingerprint, MLflow run id or model@alias."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Do the work again although it is complete.")]
SeedOption = Annotated[int | None, typer.Option(help="In place of the profile's seed.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override a field of the profile.")
]


@app.command()
def up() -> None:
    """Start the local Prefect and MLflow services, or what is missing of them."""
    from infra import services

    _show_status(services.up(say))


@app.command()
def down() -> None:
    """Stop flow runs and services of this checkout."""
    from infra import services

    services.down(say)


@app.command()
def status() -> None:
    """Show what runs where."""
    from infra import services

    _show_status(services.status())


@app.command()
def plan(
    profile: ProfileOption = "tiny",
    start: StartOption = None,
    stop: StopOption = None,
    only: OnlyOption = None,
    upstream: UpstreamOption = None,
    force: ForceOption = False,
    seed: SeedOption = None,
    set_: SetOption = None,
    layouts: Annotated[bool, typer.Option("--layouts", help="Search parallel layouts instead, fastest first.")] = False,
    stage: Annotated[str | None, typer.Option(help="--layouts: training stage, e.g. 'context-extension 4'.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="--layouts: how many; default the profile's ranks.")] = None,
    gpu_memory: Annotated[float, typer.Option(min=0.001, help="GB (10^9 bytes) of one GPU.")] = 80.0,
    peak: Annotated[float, typer.Option(min=0.001, help="TFLOP/s of one GPU, dense bfloat16.")] = 989.4,
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the peak in training.")] = 0.35,
    rollout_mfu: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the peak in generation.")] = 0.10,
    price: Annotated[float, typer.Option(min=0, help="Dollars for a GPU hour; default the M1 report's.")] = 2.0721,
    cost: Annotated[bool | None, typer.Option(help="Show cost and decoding; default above one GPU hour.")] = None,
    figure: Annotated[Path | None, typer.Option(help="PNG of operations per generated token.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for other programs.")] = False,
) -> None:
    """Print what a run would do and why, what it needs and costs; nothing is started."""
    from flows import plan as planning
    from m1.cli import plan as showing
    from m1.planning.layouts import Hardware
    from m1.planning.work import Price

    settings = planning.load_profile(profile, seed=seed, overrides=parse_overrides(set_))
    hardware = Hardware(memory=gpu_memory * 1e9, flops=peak * 1e12)
    if layouts:
        work = showing.find_work(settings, stage)
        found = showing.layout_summary(settings, work, gpus or settings.parallel.world_size, hardware)
        if as_json:
            typer.echo(json.dumps(found, indent=1))
        else:
            show(showing.layout_tables(found))
        raise typer.Exit(0 if found["layouts"] else 1)
    if stage or gpus:
        raise UsageError("--stage and --gpus belong to --layouts", "Add --layouts, or leave them out.")
    stages = planning.select(settings, start, stop, only)
    parent = _upstream(upstream, settings, stages)
    rows = planning.plan(settings, start=start, stop=stop, only=only, upstream=parent, force=force)
    content = showing.summary(settings, rows, Price(peak * 1e12, mfu, rollout_mfu, price), hardware)
    costly = showing.is_costly(content) if cost is None else cost
    drawn = showing.figure(settings, figure) if costly or figure else None
    if as_json:
        typer.echo(json.dumps({**content, "figure": str(drawn) if drawn else None}, indent=1))
    else:
        show(showing.tables(settings, rows, content, costly))
        if drawn:
            typer.echo(f"figure: {drawn}")
    for line in content["unmet"]:
        typer.echo(f"note: a run would stop here: {line}", err=True)
    if content["refused"]:
        hint = f"Change profile {settings.name}, or leave these stages out with --start, --stop and --only."
        raise UsageError("; ".join(content["refused"]), hint)


@app.command(name="run")
def run_command(
    profile: ProfileOption = "tiny",
    start: StartOption = None,
    stop: StopOption = None,
    only: OnlyOption = None,
    upstream: UpstreamOption = None,
    force: ForceOption = False,
    seed: SeedOption = None,
    set_: SetOption = None,
) -> None:
    """Run the recipe, or a section of it, and wait for the end."""
    from m1.cli import run as running

    parameters: dict[str, Any] = {"profile": profile, "start": start, "stop": stop, "only": only or None}
    parameters |= {"upstream": upstream, "force": force, "seed": seed, "overrides": parse_overrides(set_) or None}
    raise typer.Exit(running.run(parameters))


@app.command()
def lineage(
    model: Annotated[str, typer.Argument(help="For example m1-tiny@sft.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for other programs.")] = False,
) -> None:
    """Print the tree from a model back to every data hash and commit."""
    from m1.tracking import lineage as tree
    from m1.tracking import lineage_dict

    if as_json:
        typer.echo(json.dumps(lineage_dict(_tracker(), model), indent=1))
    else:
        show(tree(_tracker(), model))


@app.command()
def report(profile: ProfileOption = "tiny") -> None:
    """Write the report of the newest results and print its path."""
    from flows import plan as planning
    from m1.tracking import report as write

    settings = planning.load_profile(profile)
    typer.echo(write(settings, planning.expected))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Where to put the model; must not exist or be empty.")],
    profile: ProfileOption = "tiny",
) -> None:
    """Copy the newest exported model of a profile to a folder."""
    from m1.cli.tables import copy_export

    typer.echo(copy_export(profile, folder))


@app.command()
def data(profile: ProfileOption = "tiny") -> None:
    """List the data sets of a profile: size, hash, licence."""
    from flows import plan as planning
    from m1.cli.tables import data_table

    show(data_table(planning.load_profile(profile)))


@app.command()
def check() -> None:
    """Check this machine: Python, memory, disk, compiler, ports, versions."""
    from m1.cli.check import check_machine

    table, good = check_machine()
    show(table)
    raise typer.Exit(0 if good else 1)


def say(text: str) -> None:
    typer.echo(text)


def parse_overrides(settings: list[str] | None) -> dict[str, object]:
    """`section.field=value` with a YAML value.

    Raises:
        UsageError: there is no "=", or the value is not YAML.
    """
    overrides: dict[str, object] = {}
    for setting in settings or []:
        field, separator, text = setting.partition("=")
        if not separator or not field:
            raise UsageError(f"--set {setting}: no value", "Write --set section.field=value.")
        overrides[field] = parse_value(text, f"--set {setting}")
    return overrides


def _upstream(upstream: str | None, settings: Any, stages: list[str]) -> Path | None:
    from flows import plan as planning

    if upstream is None:
        return None
    planning.check_upstream(settings, stages)
    return planning.find_upstream(upstream, settings) or _tracker().find_run(upstream, settings)


def _tracker() -> Any:
    from infra import services
    from m1.errors import ServiceError
    from m1.tracking import Tracker

    url = services.mlflow_url()
    if url is None:
        raise ServiceError("no MLflow server is running", "Start it with `m1 up`.")
    return Tracker.connect(url)


def _show_status(services: dict[str, Any]) -> None:
    from m1.cli.tables import status_table

    show(status_table(services))
