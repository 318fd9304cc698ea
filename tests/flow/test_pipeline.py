"""Whole flow runs: a real Prefect server and worker, a real MLflow server, real DVC, light stages.

One set of services serves every test of this file, in their order. The usual ports are taken on purpose.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import scratch

from m1.run.registry import data_stages, stages

pytestmark = pytest.mark.flow

ORDER = ["corpus", "tokenizer", "tokens", "sft-data", "pretrain", "sft", "synthesize", "rl-40k", "evaluate"]
SETTINGS: dict[str, Any] = {"order": ORDER, "parallel__world_size": 2}
LONG = 900.0


#: What means something else in a shell line, in an address or in a database's URL.
PLACE = "it's 100% ä? checkout"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = scratch.make(tmp_path_factory.mktemp("flow") / PLACE, **SETTINGS)
    taken = []
    for port in (4200, 5000):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except OSError:
            pass  # taken already, which serves as well
        taken.append(listener)
    try:
        scratch.m1(folder, "up", timeout=LONG)
        yield folder
    finally:
        for listener in taken:
            listener.close()
        scratch.m1(folder, "down", check=False, timeout=LONG)
        left = scratch.processes(folder)
        for process in left:
            scratch.kill(process)
        assert left == []
        assert list((folder / ".m1" / "services").glob("*.json")) == []


def service(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / ".m1" / "services" / f"{name}.json").read_text())


def prefect(folder: Path, path: str, body: dict[str, Any] | None = None) -> Any:
    """POST to the Prefect API."""
    url = f"{service(folder, 'prefect')['extra']['url']}/api/{path}"
    for _ in range(10):
        answer = httpx.post(url, json=body or {}, timeout=60, trust_env=False)
        if answer.status_code != 503:  # sqlite was busy; Prefect's own client tries again, too
            break
        time.sleep(1)
    answer.raise_for_status()
    return answer.json()


def newest_run(folder: Path) -> dict[str, Any]:
    return prefect(folder, "flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})[0]


def task_runs(folder: Path, flow_run: dict[str, Any]) -> dict[str, str]:
    """Task run name -> name of its state."""
    wanted = {"flow_runs": {"id": {"any_": [flow_run["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
    return {run["name"]: run["state_name"] for run in prefect(folder, "task_runs/filter", wanted)}


def mlflow(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(service(folder, "mlflow")["extra"]["url"])


def run_of(folder: Path, stage: str) -> Path:
    return max((folder / "runs" / "scratch" / stage).iterdir(), key=lambda run: run.stat().st_mtime)


def test_services_are_up_on_free_ports_and_know_the_deployments(house: Path) -> None:
    for name, usual in (("prefect", 4200), ("mlflow", 5000)):
        assert service(house, name)["extra"]["port"] != usual
        assert service(house, name)["extra"]["url"].startswith("http://127.0.0.1:")
    names = {deployment["name"] for deployment in prefect(house, "deployments/filter")}
    assert names == {"full", *stages()}
    before = {name: service(house, name) for name in ("prefect", "mlflow", "worker")}
    again = scratch.m1(house, "up", timeout=LONG)
    assert "starting" not in again.stdout
    assert {name: service(house, name) for name in before} == before
    assert scratch.m1(house, "status").stdout.count("running") == 3


def test_first_run_does_everything(house: Path) -> None:
    done = scratch.m1(house, "run", "--profile", "scratch", timeout=LONG)
    flow_run = newest_run(house)
    assert flow_run["state_type"] == "COMPLETED"
    assert flow_run["id"] in done.stdout
    assert task_runs(house, flow_run) == dict.fromkeys(ORDER, "Completed")
    for stage in ORDER:
        assert any(line.startswith(stage) and " s " in line for line in done.stdout.splitlines()), stage
    assert "peak memory" in done.stdout and "orchestration" in done.stdout

    artifacts = prefect(house, "artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run["id"]]}}})
    keys = {artifact["key"] for artifact in artifacts}
    assert {"plan", "summary"} <= keys
    assert {f"mlflow-{stage}" for stage in ORDER} <= keys
    logs = prefect(house, "logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run["id"]]}}, "limit": 200})
    assert "sft continues at step 0" in {log["message"] for log in logs}

    client = mlflow(house)
    experiment = client.get_experiment_by_name("m1-scratch")
    runs = client.search_runs([experiment.experiment_id])
    ours = [run for run in runs if run.data.tags.get("prefect_run_id") == flow_run["id"]]
    (parent,) = [run for run in ours if "stage" not in run.data.tags]
    assert parent.info.status == "FINISHED"
    nested = {run.data.tags["stage"]: run for run in ours if run is not parent}
    assert {run.data.tags["mlflow.parentRunId"] for run in nested.values()} == {parent.info.run_id}
    assert set(nested) == set(ORDER)
    assert {run.info.status for run in nested.values()} == {"FINISHED"}
    assert client.get_metric_history(nested["sft"].info.run_id, "train/loss")[-1].step == 6


def test_dvc_has_nothing_to_do_afterwards(house: Path) -> None:
    data = [f"{stage}@scratch" for stage in ORDER if stage in data_stages()]
    assert "up to date" in scratch.run([sys.executable, "-m", "dvc", "status", *data], house).stdout
    lock = (house / "dvc.lock").read_text()
    repro = scratch.shell(f"python -m dvc repro {' '.join(data)}", house)
    assert "Running stage" not in repro.stdout
    assert (house / "dvc.lock").read_text() == lock


def test_second_run_skips_everything(house: Path) -> None:
    plan = scratch.m1(house, "plan", "--profile", "scratch")
    assert "0 to run" in plan.stdout
    done = scratch.m1(house, "run", "--profile", "scratch", timeout=LONG)
    assert done.stdout.count("skipped: unchanged") == len(ORDER)
    assert task_runs(house, newest_run(house)) == dict.fromkeys(ORDER, "Skipped")


def test_a_comment_in_a_data_stage_skips_it_and_dvc_hears_of_it(house: Path) -> None:
    source, lock = house / "stages" / "corpus" / "run.py", (house / "dvc.lock").read_text()
    source.write_text(f"# Another remark.\n{source.read_text()}")
    status = [sys.executable, "-m", "dvc", "status", "corpus@scratch"]
    assert "stages/corpus/run.py" in scratch.run(status, house).stdout
    scratch.m1(house, "run", "--profile", "scratch", "--stop", "tokens", timeout=LONG)
    assert task_runs(house, newest_run(house)) == dict.fromkeys(ORDER[:3], "Skipped")
    assert "up to date" in scratch.run(status, house).stdout
    assert (house / "dvc.lock").read_text() != lock


def test_a_changed_section_reruns_its_stage_and_those_below(house: Path) -> None:
    scratch.write_profile(house, **SETTINGS, sft__epochs=2.0)
    done = scratch.m1(house, "run", "--profile", "scratch", timeout=LONG)
    states = task_runs(house, newest_run(house))
    ran = [stage for stage in ORDER if states[stage] == "Completed"]
    assert ran == ["sft", "rl-40k", "evaluate"]
    assert [stage for stage in ORDER if states[stage] == "Skipped"] == [s for s in ORDER if s not in ran]
    assert "profile: sft.epochs 1.0 -> 2.0" in done.stdout


def test_plain_prefect_runs_one_stage_on_a_named_upstream(house: Path) -> None:
    """`.env` in the checkout tells the `prefect` command where the server is."""
    first_sft = min((house / "runs" / "scratch" / "sft").iterdir(), key=lambda run: run.stat().st_mtime)
    command = "python -m prefect deployment run m1/rl-40k -p profile=scratch -p force=true"
    scratch.shell(f"{command} -p upstream={first_sft.relative_to(house)} --watch", house)
    flow_run = newest_run(house)
    assert flow_run["state_type"] == "COMPLETED"
    assert task_runs(house, flow_run) == {"rl-40k": "Completed"}
    request = json.loads((run_of(house, "rl-40k") / "request.json").read_text())
    assert request["parent"] == str(first_sft)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"profile": "tinny"}, "profile 'tinny': no file"),
        ({"profile": "scratch", "overrides": {"sft.epoch": 1}}, "did you mean epochs"),
        ({"profile": "scratch", "start": "evaluate", "stop": "sft"}, "start=evaluate comes after stop=sft"),
        ({"profile": "scratch", "only": ["rl-40k"], "upstream": "m1-scratch@nobody"}, "m1-scratch@nobody"),
    ],
)
def test_bad_parameters_fail_the_run_with_one_line(house: Path, parameters: dict[str, Any], words: str) -> None:
    deployments = prefect(house, "deployments/filter")
    full = next(deployment["id"] for deployment in deployments if deployment["name"] == "full")
    created = prefect(house, f"deployments/{full}/create_flow_run", {"parameters": parameters})

    def final() -> dict[str, Any] | None:
        run = next(r for r in prefect(house, "flow_runs/filter", {"limit": 20}) if r["id"] == created["id"])
        return run if run["state_type"] in ("FAILED", "CRASHED", "COMPLETED") else None

    run = scratch.wait_for(final, 300, "the flow run's end")
    assert run["state_type"] == "FAILED"
    assert words in run["state"]["message"] and "\n" not in run["state"]["message"]
    assert task_runs(house, run) == {}


def test_bad_input_is_refused_before_a_run_is_created(house: Path) -> None:
    before = newest_run(house)["id"]
    ours = ["--profile", "scratch"]
    wrong = [["--profile", "tinny"], [*ours, "--set", "sft.epoch=1"], [*ours, "--start", "nothing"]]
    for arguments in [*wrong, [*ours, "--set", "sft.epochs"]]:
        done = scratch.m1(house, "run", *arguments, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert newest_run(house)["id"] == before


def start_slow_rl(house: Path, seed: int, *more: str) -> Any:
    """`m1 run` of rl-40k, which goes no further than step 3; returns once its checkpoint at step 2 is there."""
    scratch.behave(house, rl_40k={"hold_after": 3})
    process = scratch.start_m1(house, "run", "--profile", "scratch", "--only", "rl-40k", "--seed", str(seed), *more)
    known = set((house / "runs" / "scratch" / "rl-40k").iterdir())

    def checkpoint() -> bool:
        assert process.poll() is None, process.communicate()
        new = set((house / "runs" / "scratch" / "rl-40k").iterdir()) - known
        return any((run / "checkpoint" / "state.json").exists() for run in new)

    scratch.wait_for(checkpoint, 400, "the first checkpoint")
    return process


def ended(house: Path, process: Any) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=300)
    scratch.wait_for(lambda: not scratch.stage_processes(house), 60, "no stage process")
    scratch.behave(house)
    return process.returncode, output, errors


def continues(house: Path, seed: int) -> None:
    """The same command again goes on from the checkpoint."""
    scratch.m1(house, "run", "--profile", "scratch", "--only", "rl-40k", "--seed", str(seed), timeout=LONG)
    log = (run_of(house, "rl-40k") / "log.txt").read_text()
    steps = [int(line.split()[-1]) for line in log.splitlines() if "rl-40k continues at step" in line]
    assert steps[0] == 0 and steps[-1] >= 2


def test_a_killed_rank_fails_the_run_and_a_rerun_continues(house: Path) -> None:
    process = start_slow_rl(house, 1)
    ranks = [p for p in scratch.stage_processes(house) if "-u" in p.info["cmdline"]]
    scratch.kill(ranks[-1])
    code, _, errors = ended(house, process)
    assert code == 3
    assert errors.startswith("error: stage rl-40k was killed by SIGKILL") and errors.count("\n") == 1
    assert newest_run(house)["state_type"] == "FAILED"
    assert "stage rl-40k was killed by SIGKILL" in newest_run(house)["state"]["message"]
    continues(house, 1)


def test_a_killed_rank_is_tried_again_where_the_profile_says_so(house: Path) -> None:
    process = start_slow_rl(house, 7, "--set", "flow.retries=1", "--set", "flow.retry_delay_seconds=1")
    ranks = [p for p in scratch.stage_processes(house) if "-u" in p.info["cmdline"]]
    scratch.kill(ranks[-1])
    scratch.behave(house)
    code, output, _ = ended(house, process)
    assert code == 0
    assert "tries again: stage rl-40k was killed by SIGKILL" in output
    log = (run_of(house, "rl-40k") / "log.txt").read_text()
    steps = [int(line.split()[-1]) for line in log.splitlines() if "rl-40k continues" in line]
    assert len(steps) == 2 and steps[0] == 0 and steps[1] >= 2


def test_control_c_cancels_the_run_and_leaves_no_process(house: Path) -> None:
    process = start_slow_rl(house, 2)
    process.send_signal(signal.SIGINT)
    code, _, errors = ended(house, process)
    assert code != 0 and "was cancelled" in errors.splitlines()[-1]
    assert newest_run(house)["state_type"] == "CANCELLED"
    assert [p for p in scratch.processes(house) if "prefect.engine" in " ".join(p.info["cmdline"])] == []


def test_a_killed_flow_process_is_a_crashed_run_without_orphans(house: Path) -> None:
    process = start_slow_rl(house, 3)
    engine = next(p for p in scratch.processes(house) if "prefect.engine" in " ".join(p.info["cmdline"]))
    scratch.kill(engine)
    code, _, errors = ended(house, process)
    assert code != 0 and errors.startswith("error: ")
    assert newest_run(house)["state_type"] == "CRASHED"
    continues(house, 3)


@pytest.mark.parametrize(
    ("name", "title", "seed"),
    [("mlflow", "MLflow server", 4), ("prefect", "Prefect server", 5), ("worker", "Prefect worker", 6)],
)
def test_a_service_that_dies_ends_the_run_with_one_line(house: Path, name: str, title: str, seed: int) -> None:
    process = start_slow_rl(house, seed)
    victim = psutil.Process(service(house, name)["pid"])
    engines = [p for p in scratch.processes(house) if "prefect.engine" in " ".join(p.info["cmdline"])]
    for part in [*victim.children(recursive=True), victim] if name != "worker" else [victim]:
        scratch.kill(part)
    code, _, errors = ended(house, process)
    assert code == 4
    assert errors.startswith(f"error: the {title} died") and errors.count("\n") == 1
    assert not any(engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE for engine in engines)
    if name != "prefect":
        assert newest_run(house)["state_type"] == "FAILED"
        assert f"the {title} died" in newest_run(house)["state"]["message"]
    if name == "mlflow":
        # The worker still has the old address in its environment; the next run must find the new one.
        old_port = service(house, name)["extra"]["port"]
        with socket.socket() as squatter:
            squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            squatter.bind(("127.0.0.1", old_port))
            squatter.listen()
            continues(house, seed)
        assert service(house, name)["extra"]["port"] != old_port
    else:
        continues(house, seed)
    states = {run["state_type"] for run in prefect(house, "flow_runs/filter", {"limit": 50})}
    assert "RUNNING" not in states


def test_what_a_killed_server_leaves_running_is_stopped(house: Path) -> None:
    """MLflow's child goes on without its parent, and holds the port."""
    before = service(house, "mlflow")
    server = psutil.Process(before["pid"])
    below = server.children(recursive=True)
    assert below
    scratch.kill(server)
    scratch.m1(house, "up", timeout=LONG)
    assert not any(part.is_running() and part.status() != psutil.STATUS_ZOMBIE for part in below)
    after = service(house, "mlflow")
    assert after["pid"] != before["pid"] and after["extra"]["port"] == before["extra"]["port"]


def test_a_run_of_which_everything_died_is_found_and_closed(house: Path) -> None:
    process = start_slow_rl(house, 8)
    engine = next(p for p in scratch.processes(house) if "prefect.engine" in " ".join(p.info["cmdline"]))
    process.kill()
    scratch.kill(psutil.Process(service(house, "worker")["pid"]))
    scratch.kill(engine)
    ended(house, process)
    assert newest_run(house)["state_type"] == "RUNNING"
    said = scratch.m1(house, "up", timeout=LONG).stdout
    assert "marked as crashed" in said
    assert newest_run(house)["state_type"] == "CRASHED"


def test_a_new_stage_is_a_folder_and_a_profile(house: Path) -> None:
    """`m1 up` makes DVC and Prefect know it; nothing else is touched."""
    order = [*ORDER[:5], "extra", "extra-training"]
    scratch.add_extra_stages(house, "wider", order=order, parallel__world_size=1)
    said = scratch.m1(house, "up", timeout=LONG).stdout
    assert "dvc.yaml rewritten" in said and "prefect.yaml rewritten" in said
    names = {deployment["name"] for deployment in prefect(house, "deployments/filter")}
    assert names == {"full", "extra", "extra-training", *stages()}
    assert "rewritten" not in scratch.m1(house, "up", timeout=LONG).stdout
    done = scratch.m1(house, "run", "--profile", "wider", timeout=LONG)
    assert task_runs(house, newest_run(house)) == dict.fromkeys(order, "Completed")
    assert all(any(line.startswith(f"{name} ") for line in done.stdout.splitlines()) for name in order)
    command = "python -m prefect deployment run m1/extra-training -p profile=wider --watch"
    scratch.shell(command, house)
    assert task_runs(house, newest_run(house)) == {"extra-training": "Skipped"}
