"""What the commands print."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from flows import plan as planning
from flows.plan import Row
from infra.services import Status
from m1 import paths
from m1.config.corpus import Corpus
from m1.config.profile import Profile
from m1.data import content, corpus_spec, lock
from m1.errors import UsageError
from m1.planning.arithmetic import parameters
from m1.run.contract import fault_of, load_result, newest_run
from m1.run.registry import data_stages, stage
from m1.run.summary import StageRow


def table(title: str | None, *columns: str, right: Iterable[str] = ()) -> Table:
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def status_table(services: Mapping[str, Status]) -> Table:
    made = table(None, "service", "state", "pid", "address", "log")
    for service in services.values():
        state = "running" if service.healthy else "not answering" if service.pid else "stopped"
        pid = str(service.pid or "-")
        made.add_row(service.name, state, pid, service.url or "-", paths.shown(service.log) if service.pid else "-")
    return made


#: Ends the reason of a stage that runs because one above it does; said once for the whole table.
_PERHAPS = " (skipped after all if that changes nothing)"


def plan_table(settings: Profile, rows: Sequence[Row]) -> Table:
    counts = parameters(settings.model)
    size = f"{short(counts.total)} parameters, {short(counts.active)} active per token"
    made = table(f"profile {settings.name}: {size}", "stage", "does", "why", "inputs", "tokens", "parameters", "FLOPs")
    for column in made.columns[4:]:
        column.justify = "right"
    words = [word for row in rows for text in row.inputs for word in f"{text},".split()]
    made.columns[3].min_width = max(map(len, words), default=0)  # names stay in one piece where the terminal is narrow
    for row in rows:
        mark = "≤ " if row.cost and row.cost.bound else ""
        tokens = f"{mark}{short(row.cost.tokens)}" if row.cost else "-"
        flops = f"{mark}{row.cost.flops:.1e}" if row.cost else "-"
        size = "-" if stage(row.stage).makes_data else short(counts.total)
        action = Text(row.action, style="green" if row.action == "skip" else "yellow")
        reason = row.reason.replace(_PERHAPS, "*")
        made.add_row(row.stage, action, reason, ", ".join(row.inputs) or "-", tokens, size, flops)
    costs = [row.cost for row in rows if row.action == "run" and row.cost]
    total, expected = sum(cost.flops for cost in costs), sum(cost.tokens for cost in costs)
    running = sum(row.action == "run" for row in rows)
    made.add_section()
    made.add_row(f"{running} to run", "", "", "", f"≤ {short(expected)}", "", f"≤ {total:.1e}")
    if any(_PERHAPS in row.reason for row in rows):
        made.caption, made.caption_justify = f"*{_PERHAPS}", "left"
    return made


def summary_table(summary: Sequence[StageRow]) -> Table:
    made = table(
        None, "stage", "time", "key metric", "before", "after", "checkpoint", right=("time", "before", "after")
    )
    for row in summary:
        time = f"{row.seconds:.1f} s" if row.status == "ran" else row.status
        place = f"{row.output}/{row.checkpoint}" if row.checkpoint else row.output or "-"
        made.add_row(row.stage, time, row.key_metric or "-", number(row.before), number(row.after), place)
    return made


def data_table(settings: Profile) -> Table:
    columns = ("data set", "size", "files", "hash", "state", "licence")
    made = table(f"data sets of profile {settings.name}", *columns, right=("size",))
    for name in data_stages():
        entry = lock.entry(name, settings.name)
        if entry is None:
            made.add_row(name, "-", "-", "-", "not made yet", _licence(settings, name))
            continue
        fault = content.fault_of(entry)
        size, files = ("-", "-") if fault == content.GONE else (megabytes(entry.size), str(entry.files))
        made.add_row(name, size, files, entry.digest, fault or "as recorded", _licence(settings, name))
    return made


def copy_export(profile_name: str, folder: Path) -> str:
    """Copy the newest finished export of a profile; returns what was done.

    Raises:
        UsageError: there is no export, or `folder` is not empty.
    """
    settings = planning.load_profile(profile_name)
    run = newest_run(settings.name, "export")
    result = load_result(run) if run else None
    if run is None or result is None or result.checkpoint is None:
        raise UsageError(f"profile {settings.name} has no finished export", "Make one: `m1 run --only export`.")
    if (fault := fault_of(result)) is not None:
        hint = f"Make it again: `m1 run --profile {settings.name} --only export`."
        raise UsageError(f"the export in {paths.shown(run)} is damaged: {fault}", hint)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder", "Name another.")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(run / result.checkpoint, unfinished)
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)
    return f"{paths.shown(run / result.checkpoint)} -> {folder}"


def _licence(settings: Profile, name: str) -> str:
    """Licences of the text sources for what is made from them, ours for what is generated."""
    if name in ("sft-data", "synthesize"):
        return "Apache-2.0 (generated by this project)"
    corpus = settings.find("corpus", Corpus)
    if corpus is None:
        return "not stated"
    try:
        spec = corpus_spec.load(corpus.spec)
    except UsageError as error:
        return error.what
    return ", ".join(dict.fromkeys(source.licence for source in spec.sources))


def short(count: float) -> str:
    """1234567 as "1.23 M"."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
