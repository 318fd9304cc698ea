"""A scratch copy of the checkout with light stages, for tests of everything around the stages.

Services, launcher, flow, tracking, DVC and the stage contract are the real ones. Only the work inside the stages is
light: a stage counts to `STEPS`, checkpoints every second step, and is slow, waits or fails as `stub.json` says.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from m1 import paths
from m1.errors import M1Error
from m1.run import derived
from m1.run.registry import stages
from m1.run.stage import Need

#: Names in `m1.paths` and what they stand for in a copy.
PLACES = {"ROOT": ".", "PROFILES": "profiles", "DATA_SPECS": "data_specs", "STATE": ".m1"}
CHECKOUT = Path(__file__).resolve().parents[2]
COPIED = ("m1", "infra", "flows", "prefect.yaml", "dvc.yaml", "params.yaml", "data_specs", ".dvc/config", ".gitignore")
COPIED += (".dvcignore", "stages/__init__.py")

LIGHT_STAGE = '''\
"""A light stage: counts, checkpoints, continues."""
import json, os, sys, time
from m1 import paths
from m1.errors import UsageError
from m1.files import write_json

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
        sys.stdout.write(f"{context.stage} continues at step {first}\\n")
    for step in range(first, STEPS):
        time.sleep(how.get("step_seconds", 0.01))
        context.log_metrics(step + 1, {"train/loss": 3.0 / (step + 1)})
        context.progress(step + 1, STEPS, f"loss {3.0 / (step + 1):.2f}")
        if step % 2 and rank == 0:
            folder.mkdir(exist_ok=True)
            write_json(state, {"step": step + 1})
        if step + 1 == how.get("hold_after"):
            time.sleep(3600)  # a test ends it here
    if rank == 0 and not state.exists():
        folder.mkdir(exist_ok=True)
        write_json(state, {"step": STEPS})
    return context.finish(
        checkpoint=None if context.stage in ("evaluate", "export") else folder, key_metric="loss",
        before=3.0, after=0.5, metrics={"loss": 0.5})
'''

LIGHT_DATA_STAGE = '''\
"""A light data stage: one small file that depends on the profile's section."""
import json, time
from m1 import paths
from m1.errors import UsageError

STAGE = "NAME"

def run(profile, folder):
    how = paths.ROOT / "stub.json"
    how = json.loads(how.read_text()).get(STAGE, {}) if how.exists() else {}
    if "fail" in how:
        raise UsageError(how["fail"], "Mend the test.")
    time.sleep(how.get("seconds", 0))
    section = profile.to_dict()[STAGE]
    (folder / "content.json").write_text(json.dumps(section))
    return {"stage": STAGE}
'''

#: Two stages that the recipe does not have, each one folder and nothing else.
EXTRA = {
    "extra/stage.py": """
from m1.config.base import Section
from m1.run.stage import Kind, Stage

class Extra(Section):
    amount: int

STAGES = (
    Stage(
        name="extra", about="Rows that a test asks for.", kind=Kind.DATA, section=Extra, run="stages.extra.run:run",
        reads=("corpus",), settings=("seed",),
    ),
)
""",
    "extra/run.py": """
from m1.files import write_rows

def run(profile, output):
    amount = profile.to_dict()["extra"]["amount"]
    return {"rows": write_rows(output / "rows.jsonl", [{"number": number} for number in range(amount)])}
""",
    "extra_training/stage.py": """
from m1.config.base import Section
from m1.run.stage import Cost, Kind, Stage

class ExtraTraining(Section):
    amount: int

STAGES = (
    Stage(
        name="extra-training", about="Weights that a test asks for.", kind=Kind.TRAINING, section=ExtraTraining,
        run="stages.extra_training.run:run", reads=("extra",), settings=("seed", "model"), needs_checkpoint=True,
        cost=lambda profile: Cost(1000 * profile.to_dict()["extra-training"]["amount"], training_flops=1e6),
    ),
)
""",
    "extra_training/run.py": """
from m1.files import read_rows, write_json

def run(context):
    rows = read_rows(context.data["extra"] / "rows.jsonl", "")
    assert (context.parent_checkpoint() / "state.json").is_file()
    context.log_metrics(1, {"train/loss": 1.0 / context.section.amount})
    folder = context.output / "checkpoint"
    folder.mkdir()
    write_json(folder / "state.json", {"step": 1, "rows": len(rows)})
    return context.finish(checkpoint=folder, key_metric="loss", before=1.0, after=0.25, metrics={"loss": 0.25})
""",
}


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
    for stage, record in stages().items():
        package = folder / record.package.replace(".", "/")
        shutil.copytree(CHECKOUT / "stages" / package.name, package, ignore=_all_but_the_record, dirs_exist_ok=True)
        data = LIGHT_DATA_STAGE.replace("NAME", stage)
        work = folder / f"{record.module.replace('.', '/')}.py"
        work.write_text(data if record.makes_data else LIGHT_STAGE)
    with pytest.MonkeyPatch.context() as patch:  # DVC shall watch the light stages' own code
        patch.setattr(paths, "ROOT", folder)
        derived.update()
    write_profile(folder, name, **changes)
    shutil.copy(CHECKOUT / "profiles" / "tiny.yaml", folder / "profiles")  # params.yaml lists it
    run(["git", "init", "-q"], folder)
    return folder


def _all_but_the_record(folder: str, names: list[str]) -> list[str]:
    """What of a stage's package is not copied; `checks` belongs to the record of rl."""
    return [name for name in names if name not in ("__init__.py", "__main__.py", "stage.py", "checks.py")]


def add_extra_stages(folder: Path, name: str = "scratch", order: Sequence[str] = (), **changes: Any) -> None:
    """Put two new stages into the copy, and write a profile that asks for them; nothing else is touched."""
    for place, source in EXTRA.items():
        file = folder / "stages" / place
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)
        (file.parent / "__init__.py").write_text("")
        main = f"from infra.stage_command import main\nmain('stages.{file.parent.name}')\n"
        (file.parent / "__main__.py").write_text(main)
    changes = {"extra__amount": 3, "extra_training__amount": 4, **changes}
    write_profile(folder, name, order=list(order), **changes)


def nothing_missing(need: Need) -> M1Error | None:
    """For `resolve` and the plan: whatever task families need is there."""
    return None


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
    """The command line of the copy, in the background, where Ctrl-C counts even if the tests run where it does not."""
    return subprocess.Popen(
        [sys.executable, "-m", "m1", *arguments],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
