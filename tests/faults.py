"""Seeded kills of any process at any moment of a whole `smoke` flow: `python -m tests.faults --kills 100 --seed 1`.

The flow is run once undisturbed, in a copy of the checkout. Then it is run again and again from the same data, and in
each run a process is killed by SIGKILL, until one comes to its end. What it has made must be byte for byte what the
undisturbed one made, no process may be left behind, and MLflow and Prefect must tell the same story as the folders.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from m1.files import remove
from tests.checkout import copy_checkout
from tests.flow import scratch

PROFILE = "smoke"
#: What is killed -> a word of its command line.
VICTIMS = {
    "rank": " -u -m stages.",
    "torchrun": "torch.distributed.run",
    "supervisor": "supervise.py",
    "flow": "prefect.engine",
    "m1 run": "-m m1 run",
    "worker": "prefect worker",
    "Prefect server": "prefect server",
    "MLflow server": "mlflow server",
    "MLflow's child": "uvicorn",
    "data stage": " -m stages.",
}
#: Files that must be the same to the last byte, below `runs/`.
COMPARED = ("*/*/checkpoints/*/*.distcp", "*/*/model/*.safetensors", "*/*/rollouts/*.jsonl", "*/*/samples/*.jsonl")
#: Seconds that a run may take to end after a kill, and its processes to go after that.
PATIENCE, GONE = 900.0, 90.0


@dataclass(frozen=True)
class Kill:
    """One kill, and what became of the run.

    Attributes:
        victim: a key of `VICTIMS`.
        after: seconds from the start of `m1 run` to the kill.
        stage: that was running, or "".
        code: exit code of `m1 run`; minus 9 where it was the victim.
        left: processes of stages that were still there when the run had ended.
    """

    victim: str
    after: float
    stage: str
    code: int
    left: int


def made(folder: Path) -> dict[str, str]:
    """Path below `runs/<profile>` -> SHA-256, of everything that is compared."""
    runs = folder / "runs" / PROFILE
    files = sorted(file for pattern in COMPARED for file in runs.glob(pattern))
    return {str(file.relative_to(runs)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def strike(folder: Path, rng: random.Random, length: float) -> Kill | None:
    """One `m1 run` in which one process is killed; None if the run was over before that.

    Args:
        length: seconds that an undisturbed run takes.
    """
    after, wanted = rng.uniform(0, length), rng.choice(sorted(VICTIMS))
    started = time.monotonic()
    run = scratch.start_m1(folder, "run", "--profile", PROFILE)
    while time.monotonic() - started < after and run.poll() is None:
        time.sleep(0.05)
    names = [wanted, *rng.sample(sorted(VICTIMS), len(VICTIMS))]
    found = next(((name, process) for name in names for process in _processes(folder, name)), None)
    if run.poll() is not None or found is None:
        run.communicate()
        return None
    stage = _stage(folder)
    scratch.kill(found[1])
    try:
        run.communicate(timeout=PATIENCE)
        scratch.wait_for(lambda: not _flow_is_alive(folder), PATIENCE, "the end of the flow run")
        scratch.wait_for(lambda: not scratch.stage_processes(folder), GONE, "no process of a stage")
        left = 0
    except AssertionError:
        left = len(scratch.stage_processes(folder))
    return Kill(found[0], round(time.monotonic() - started, 1), stage, run.returncode, left)


def _processes(folder: Path, name: str) -> list[psutil.Process]:
    return scratch.processes(folder, VICTIMS[name])


def _flow_is_alive(folder: Path) -> bool:
    """Whether a flow goes on without the `m1 run` that asked for it, which was killed."""
    return bool(_processes(folder, "flow")) and bool(_processes(folder, "worker"))


def _stage(folder: Path) -> str:
    """The stage that runs, by the command line of its process."""
    lines = (" ".join(process.info["cmdline"]) for process in scratch.processes(folder, "stages."))
    return next((line.partition("-m stages.")[2].split()[0] for line in lines if "-m stages." in line), "")


def campaign(folder: Path, kills: int, seed: int, length: float, reference: dict[str, str]) -> Iterator[Kill | str]:
    """Kills, and the faults that were found after them, as they come.

    Args:
        folder: a copy of the checkout in which the flow has come to its end, undisturbed, in `length` seconds.
        reference: what it made, see `made`.
    """
    rng, done = random.Random(seed), 0
    while done < kills:
        remove(folder / "runs" / PROFILE)
        while done < kills and (kill := strike(folder, rng, length)) is not None:
            done += 1
            yield kill
            if kill.left:
                yield f"kill {done}: {kill.left} processes are left behind"
        last = scratch.m1(folder, "run", "--profile", PROFILE, check=False, timeout=PATIENCE)
        if last.returncode:
            yield f"after kill {done} the flow does not come to its end: {last.stderr.strip()}"
            return
        now = made(folder)
        different = sorted(name for name in now.keys() | reference.keys() if now.get(name) != reference.get(name))
        yield from (f"after kill {done}: {name} is not what the undisturbed run made" for name in different)
        yield from (f"after kill {done}: {fault}" for fault in told_otherwise(folder))


def told_otherwise(folder: Path) -> Iterator[str]:
    """Where metrics.jsonl, MLflow or Prefect tell something else than the run folders."""
    for file in sorted((folder / "runs" / PROFILE).glob("*/*/metrics.jsonl")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        keys = [(line["step"], *sorted(line["metrics"])) for line in lines if "metrics" in line]
        if len(keys) != len(set(keys)):
            yield f"{file.parent.parent.name}: a step stands twice in metrics.jsonl"
    yield from _mlflow_faults(folder)
    yield from _prefect_faults(folder)


def _mlflow_faults(folder: Path) -> Iterator[str]:
    from mlflow import MlflowClient

    client = MlflowClient(_url(folder, "mlflow"))
    experiment = client.get_experiment_by_name(f"m1-{PROFILE}")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=5000)
    yield from (f"MLflow: {run.info.run_name} is RUNNING" for run in runs if run.info.status == "RUNNING")
    finished = {run.data.tags.get("fingerprint") for run in runs if run.info.status == "FINISHED"}
    for file in sorted((folder / "runs" / PROFILE).glob("*/*/result.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["fingerprint"] not in finished:
            yield f"MLflow: no finished run of {result['stage']}, which is complete"


def _prefect_faults(folder: Path) -> Iterator[str]:
    import httpx

    address = f"{_url(folder, 'prefect')}/api/flow_runs/filter"
    answer = httpx.post(address, json={"limit": 200}, timeout=60, trust_env=False)
    answer.raise_for_status()
    for run in answer.json():
        if run["state_type"] in ("RUNNING", "PENDING", "CANCELLING"):
            yield f"Prefect: a flow run is {run['state_type']}"


def _url(folder: Path, service: str) -> str:
    record = json.loads((folder / ".m1" / "services" / f"{service}.json").read_text(encoding="utf-8"))
    return record["extra"]["url"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="m1-faults-") as place:
        folder = copy_checkout(Path(place) / "checkout")
        try:
            print("the undisturbed run", flush=True)
            scratch.m1(folder, "run", "--profile", PROFILE, timeout=PATIENCE)
            reference = made(folder)
            remove(folder / "runs" / PROFILE)
            started = time.monotonic()
            scratch.m1(folder, "run", "--profile", PROFILE, timeout=PATIENCE)
            length = time.monotonic() - started
            print(f"{len(reference)} files, {length:.0f} s from the same data", flush=True)
            faults = 0
            for found in campaign(folder, options.kills, options.seed, length, reference):
                faults += isinstance(found, str)
                print(found if isinstance(found, str) else json.dumps(asdict(found)), flush=True)
        finally:
            scratch.m1(folder, "down", check=False)
    print(f"{options.kills} kills, seed {options.seed}: {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
