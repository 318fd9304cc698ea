"""A scratch copy of the checkout with light stages, for tests of everything around the stages.

Services, launcher, flow, tracking, DVC and the stage contract are the real ones. Only the work inside the stages is
light: a stage counts to `STEPS`, checkpoints every second step, and obeys `stub.json` (slow, failing) for faults.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from m1.stage import STAGE_INFO

from m1.run.profiles import DATA_STAGES

CHECKOUT = Path(__file__).resolve().parents[2]
COPIED = ("m1", "infra", "flows", "prefect.yaml", "dvc.yaml", "params.yaml", "data_specs", ".dvc/config", ".gitignore")

LIGHT_STAGE = '''
"""A light stage: counts, checkpoints, continues."""
import json, os, signal, sys, time
from m1 import paths
from m1.errors import Interrupted, UsageError
from m1.stage import main, write_json

STEPS = 6

def run(context):
    settings = paths.ROOT / "stub.json"
    how = json.loads(settings.read_text()).get(context.stage, {}) if settings.exists() else {}
    if "fail" in how:
        raise UsageError(how["fail"], "Mend the test.")
    if "crash" in how:
        raise RuntimeError(how["crash"])
    rank = int(os.environ.get("RANK", "0"))
    sys.stdout.write(f"{context.stage} rank {rank} pid {os.getpid()}\\n")  # in one piece: print sends the end apart
    folder = context.output / "checkpoint"
    state = folder / "state.json"
    first = json.loads(state.read_text())["step"] if state.exists() else 0
    if rank == 0:
        print(f"{context.stage} continues at step {first}", flush=True)
    for step in range(first, STEPS):
        time.sleep(how.get("step_seconds", 0.01))
        context.log_metrics(step + 1, {"train/loss": 3.0 / (step + 1)})
        context.progress(step + 1, STEPS, f"loss {3.0 / (step + 1):.2f}")
        if step % 2 and rank == 0:
            folder.mkdir(exist_ok=True)
            write_json(state, {"step": step + 1})
    if rank == 0 and not state.exists():
        folder.mkdir(exist_ok=True)
        write_json(state, {"step": STEPS})
    context.finish(checkpoint=None if context.stage in ("evaluate", "export") else folder, key_metric="loss",
                   before=3.0, after=0.5, metrics={"loss": 0.5})

if __name__ == "__main__":
    main(run)
'''

LIGHT_DATA_STAGE = '''
"""A light data stage: one small file that depends on the profile's section."""
import json, time
from m1 import paths
from m1.errors import UsageError
from m1.stage import data_main

def run(settings, folder):
    how = paths.ROOT / "stub.json"
    how = json.loads(how.read_text()).get(STAGE, {}) if how.exists() else {}
    if "fail" in how:
        raise UsageError(how["fail"], "Mend the test.")
    time.sleep(how.get("seconds", 0))
    (folder / "content.json").write_text(settings.section(STAGE).model_dump_json())
    return {"stage": STAGE}

if __name__ == "__main__":
    data_main(run)
'''


def make(folder: Path, name: str = "scratch", **changes: Any) -> Path:
    """Build the copy in `folder`; `changes` are profile fields with dots written as double underscores."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in COPIED:
        source = CHECKOUT / entry
        if source.is_dir():
            shutil.copytree(source, folder / entry, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / entry).parent.mkdir(exist_ok=True)
            shutil.copy(source, folder / entry)
    for stage, info in STAGE_INFO.items():
        package = folder / info.module.replace(".", "/")
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("")
        data = f"STAGE = {stage!r}\n{LIGHT_DATA_STAGE}"
        (package / "__main__.py").write_text(data if stage in DATA_STAGES else LIGHT_STAGE)
    for info in STAGE_INFO.values():
        for entry in info.code:  # what a fingerprint covers must be there, though no light stage imports it
            path = folder / entry
            if not path.exists() and (CHECKOUT / entry).suffix == ".py":
                path.write_text("")
            elif not path.exists():
                path.mkdir(parents=True)
                (path / "__init__.py").write_text("")
    write_profile(folder, name, **changes)
    shutil.copy(CHECKOUT / "profiles" / "tiny.yaml", folder / "profiles")  # params.yaml lists it
    run(["git", "init", "-q"], folder)
    return folder


def write_profile(folder: Path, name: str = "scratch", **changes: Any) -> None:
    content = yaml.safe_load((CHECKOUT / "profiles" / "tiny.yaml").read_text())
    content["name"] = name
    for part in ("synthesize", "evaluate"):  # without the sandbox, unless a test asks for it
        del content[part]["swe"]
    for field, value in changes.items():
        section = content
        *parents, last = field.split("__")
        for part in parents:
            section = section.setdefault(part.replace("_", "-"), {})
        section[last] = value
    (folder / "profiles").mkdir(exist_ok=True)
    (folder / "profiles" / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def environment() -> dict[str, str]:
    """Ours, without anything that points at another server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    return {**kept, "PYTHONPATH": "", "COLUMNS": "200", "DVC_NO_ANALYTICS": "1"}


Done = subprocess.CompletedProcess[str]


def run(command: list[str], folder: Path, *, check: bool = True, timeout: float = 300) -> Done:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
    assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def shell(line: str, folder: Path) -> Done:
    """A shell line with our interpreter first on the path, as a user's activated environment has it."""
    return run(["sh", "-c", f"PATH={Path(sys.executable).parent}:$PATH; {line}"], folder)


def m1(folder: Path, *arguments: str, check: bool = True, timeout: float = 300) -> Done:
    """The command line of the copy."""
    return run([sys.executable, "-m", "m1", *arguments], folder, check=check, timeout=timeout)


def start_m1(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "m1", *arguments],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def behave(folder: Path, **stages: dict[str, Any]) -> None:
    """Tell light stages to be slow or to fail: behave(folder, sft={"step_seconds": 1})."""
    (folder / "stub.json").write_text(json.dumps({name.replace("_", "-"): how for name, how in stages.items()}))


def wait_for(condition: Any, seconds: float = 60.0, what: str = "condition") -> Any:
    """The first true value of `condition()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what} did not become true within {seconds} s")


def processes(folder: Path, word: str = "") -> list[psutil.Process]:
    """Live processes that work in `folder` and have `word` in their command line, apart from ourselves."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        info = process.info
        inside = info["cwd"] == str(folder) and process.pid != os.getpid()
        if inside and info["status"] != psutil.STATUS_ZOMBIE and word in " ".join(info["cmdline"] or []):
            found.append(process)
    return found


def stage_processes(folder: Path) -> list[psutil.Process]:
    """Supervisor, torchrun and ranks of a stage in `folder`."""
    return [
        p for p in processes(folder) if any(word in " ".join(p.info["cmdline"]) for word in ("stages.", "supervise"))
    ]


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
