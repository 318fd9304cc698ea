"""`m1 check`: what this machine has, and whether that is enough."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

from rich.text import Text

from infra import services
from m1 import paths
from m1.cli.tables import table
from m1.errors import ServiceError
from m1.tracking.records import git_revision

_VERSIONS = ("torch", "megatron-core", "prefect", "mlflow", "dvc", "datasets", "transformers")
_MIN_MEMORY = 8 * 1024**3


def check_machine() -> tuple[Any, bool]:
    """Table of findings, and whether none of them forbids a run."""
    findings = [
        _python(),
        _cores(),
        _memory(),
        _disk(),
        _tool("compiler", ("g++", "c++", "clang++"), "faster lightning kernels", needed=False),
        _tool("git", ("git",), "lineage and DVC", needed=True),
        _checkout(),
        _engine(),
        _port("prefect", services.PREFECT_PORT),
        _port("mlflow", services.MLFLOW_PORT),
        *(_version(name) for name in _VERSIONS),
    ]
    made = table(None, "what", "state", "found")
    styles = {"ok": "green", "note": "yellow", "bad": "bold red"}
    for what, state, found in findings:
        made.add_row(what, Text(state, style=styles[state]), found)
    return made, all(state != "bad" for _, state, _ in findings)


Finding = tuple[str, str, str]


def _python() -> Finding:
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return "python", "ok" if good else "bad", f"{platform.python_version()} ({sys.executable}); 3.11 or 3.12 is needed"


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return "cores", "ok" if usable >= 2 else "note", f"{usable}; two ranks of profile tiny want 2"


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    state = "ok" if memory.available >= _MIN_MEMORY else "note"
    return (
        "memory",
        state,
        f"{memory.available / 1024**3:.1f} of {memory.total / 1024**3:.1f} GiB free; 8 GiB are enough",
    )


def _disk() -> Finding:
    free = shutil.disk_usage(paths.ROOT).free
    state = "ok" if free >= services.MIN_FREE_BYTES else "bad"
    return "disk", state, f"{free / 1024**3:.1f} GiB free; {services.MIN_FREE_BYTES / 1024**3:.0f} GiB are needed"


def _tool(what: str, names: tuple[str, ...], use: str, *, needed: bool) -> Finding:
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        return what, "bad" if needed else "note", f"none of {', '.join(names)} found; it is for {use}"
    return what, "ok", path


def _checkout() -> Finding:
    """Whether runs can be written, and whether their commit will be known."""
    written = [place for name in (".m1", "runs", "data") if (place := paths.ROOT / name).exists()]
    closed = [place for place in (paths.ROOT, *written) if not os.access(place, os.W_OK)]
    if closed:
        return "checkout", "bad", f"{', '.join(map(str, closed))}: not writable; give yourself the right, or copy it"
    commit = git_revision().commit
    if commit == "none":
        return (
            "checkout",
            "note",
            f"{paths.ROOT}; no commit of git is known here, and the lineage of models will say so",
        )
    return "checkout", "ok", f"{paths.ROOT}, commit {commit[:8]}"


def _engine() -> Finding:
    from infra.sandbox import engine

    try:
        found = engine.describe()
    except ServiceError as error:
        return "docker", "note", f"{error} Without it, the sandbox and the software engineering tasks are skipped."
    return "docker", "ok", f"engine {found['version']}, for the sandbox; runtimes {', '.join(found['runtimes'])}"


def _port(name: str, port: int) -> Finding:
    record = services.running(name)
    if record is not None:
        return f"port {name}", "ok", f"{record.extra['port']}, in use by our own server"
    free = services.free_port(port) == port
    return f"port {name}", "ok" if free else "note", f"{port} is free" if free else f"{port} is taken; another is used"


def _version(name: str) -> Finding:
    try:
        return name, "ok", importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name, "bad", "not installed; run `make setup`"
