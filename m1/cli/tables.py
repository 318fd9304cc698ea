"""What the commands print."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from m1 import paths
from m1.errors import UsageError
from m1.profile import DATA_STAGES, Profile


def table(title: str | None, *columns: str, right: Iterable[str] = ()) -> Table:
    made = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def status_table(services: dict[str, Any]) -> Table:
    made = table(None, "service", "state", "pid", "address", "log")
    for service in services.values():
        state = "running" if service.healthy else "not answering" if service.pid else "stopped"
        pid = str(service.pid or "-")
        made.add_row(service.name, state, pid, service.url or "-", _shown(service.log) if service.pid else "-")
    return made


#: Ends the reason of a stage that runs because one above it does; said once for the whole table.
_PERHAPS = " (skipped after all if that changes nothing)"


def plan_table(settings: Profile, rows: list[Any]) -> Any:
    from flows.plan import expected_flops
    from m1.arithmetic import parameters

    counts = parameters(settings.model)
    size = f"{short(counts.total)} parameters, {short(counts.active)} active per token"
    made = table(f"profile {settings.name}: {size}", "stage", "does", "why", "inputs", "tokens", "parameters", "FLOPs")
    for column in made.columns[4:]:
        column.justify = "right"
    words = [word for row in rows for text in row.inputs for word in f"{text},".split()]
    made.columns[3].min_width = max(map(len, words), default=0)  # names stay in one piece where the terminal is narrow
    flops_of = {row.stage: expected_flops(settings, row.stage) for row in rows}
    for row in rows:
        tokens = "-" if row.tokens is None else f"{'≤ ' if row.bound else ''}{short(row.tokens)}"
        count = flops_of[row.stage]
        flops = "-" if count is None else f"{'≤ ' if row.bound else ''}{count:.1e}"
        size = "-" if row.stage in DATA_STAGES else short(counts.total)
        action = Text(row.action, style="green" if row.action == "skip" else "yellow")
        reason = row.reason.replace(_PERHAPS, "*")
        made.add_row(row.stage, action, reason, ", ".join(row.inputs) or "-", tokens, size, flops)
    total = sum(flops_of[row.stage] or 0.0 for row in rows if row.action == "run")
    expected = sum(row.tokens or 0 for row in rows if row.action == "run")
    running = sum(row.action == "run" for row in rows)
    made.add_section()
    made.add_row(f"{running} to run", "", "", "", f"≤ {short(expected)}", "", f"≤ {total:.1e}")
    if any(_PERHAPS in row.reason for row in rows):
        made.caption, made.caption_justify = f"*{_PERHAPS}", "left"
    return made


def summary_table(summary: list[dict[str, Any]]) -> Table:
    made = table(
        None, "stage", "time", "key metric", "before", "after", "checkpoint", right=("time", "before", "after")
    )
    for row in summary:
        time = f"{row['seconds']:.1f} s" if row["status"] == "ran" else row["status"]
        checkpoint = f"{row['output']}/{row['checkpoint']}" if row.get("checkpoint") else row.get("output", "-")
        made.add_row(
            row["stage"],
            time,
            row.get("key_metric") or "-",
            number(row.get("before")),
            number(row.get("after")),
            checkpoint,
        )
    return made


def data_table(settings: Profile) -> Table:
    made = table(
        f"data sets of profile {settings.name}", "data set", "size", "files", "hash", "licence", right=("size",)
    )
    for stage in DATA_STAGES:
        entry = _lock_entry(f"{stage}@{settings.name}")
        if entry is None:
            made.add_row(stage, "-", "-", "not made yet", _licence(settings, stage))
            continue
        size, files = megabytes(entry.get("size", 0)), str(entry.get("nfiles", 1))
        made.add_row(stage, size, files, entry["md5"], _licence(settings, stage))
    return made


def copy_export(profile_name: str, folder: Path) -> str:
    """Copy the newest finished export of a profile; returns what was done.

    Raises:
        UsageError: there is no export, or `folder` is not empty.
    """
    from flows.plan import load_profile
    from m1.stage import load_result, newest_run

    settings = load_profile(profile_name)
    run = newest_run(settings.name, "export")
    result = load_result(run) if run else None
    if run is None or result is None or result.checkpoint is None:
        raise UsageError(f"profile {settings.name} has no finished export", "Make one: `m1 run --only export`.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder", "Name another.")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(run / result.checkpoint, unfinished)
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)
    return f"{_shown(run / result.checkpoint)} -> {folder}"


def _lock_entry(target: str) -> dict[str, Any] | None:
    import yaml

    lock = paths.ROOT / "dvc.lock"
    if not lock.is_file():
        return None
    stages = (yaml.safe_load(lock.read_text()) or {}).get("stages") or {}
    outs = (stages.get(target) or {}).get("outs") or []
    return outs[0] if outs else None


def _licence(settings: Profile, stage: str) -> str:
    """Licences of the text sources for what is made from them, ours for what is generated."""
    import yaml

    if stage in ("sft-data", "synthesize"):
        return "Apache-2.0 (generated by this project)"
    spec = paths.DATA_SPECS / f"{settings.corpus.spec}.yaml"
    if not spec.is_file():
        return f"no file {_shown(spec)}"
    found: list[str] = []
    _collect_licences(yaml.safe_load(spec.read_text()), found)
    return ", ".join(dict.fromkeys(found)) or "not stated"


def _collect_licences(node: Any, found: list[str]) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("licence", "license") and isinstance(value, str):
                found.append(value)
            else:
                _collect_licences(value, found)
    elif isinstance(node, list):
        for value in node:
            _collect_licences(value, found)


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


def _shown(path: Path) -> str:
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)
