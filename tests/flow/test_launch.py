"""The launcher with light stages: results, failures, locks, and processes that must be gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import scratch
from test_plan import make_data

from flows.plan import load_profile
from infra import launch
from infra.launch import stages as launching
from m1 import paths
from m1.data import dvc, lock
from m1.errors import Interrupted, ServiceError, StageFailed, UsageError
from m1.run import folder
from m1.run.contract import StageRequest, load_result
from m1.run.resolve import resolve


@pytest.fixture
def request_of(checkout: Path) -> Any:
    make_data(checkout)

    def build(stage: str = "pretrain", **overrides: Any) -> StageRequest:
        # One rank, unless a test is about ranks: torchrun takes seconds to start.
        return resolve(
            stage, load_profile("scratch", overrides={"parallel.world_size": 1, **overrides}), scratch.nothing_missing
        )

    return build


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same stage without torchrun."""
    monkeypatch.setattr(
        launching,
        "stage_command",
        lambda request, profile, path: (sys.executable, "-m", "stages.pretrain", "--request", str(path)),
    )


def test_a_stage_runs_once_and_streams_its_lines(request_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(monkeypatch)
    lines: list[str] = []
    request = request_of()
    result = launch.run_stage(request, on_line=lines.append)
    assert result.after == 0.5 and result.fingerprint == request.fingerprint
    assert "pretrain continues at step 0" in lines
    log = (Path(request.output) / "log.txt").read_text()
    assert all(line in log for line in lines)

    lines.clear()
    assert launch.run_stage(request, on_line=lines.append) == result
    assert lines == [], "a complete run folder is not run again"
    again = launch.run_stage(request, force=True, on_line=lines.append)
    assert "pretrain continues at step 0" in lines and again.finished_at > result.finished_at


def test_torchrun_gets_the_world_size_and_the_threads(request_of: Any, checkout: Path) -> None:
    (checkout / "stages" / "pretrain" / "__main__.py").write_text(
        "import os\n"
        'told = [os.environ[k] for k in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")]\n'
        "os.write(1, f\"told {' '.join(told)}\\n\".encode())  # one write: two ranks share the pipe\n"
    )
    request = request_of(**{"parallel.world_size": 2, "parallel.threads_per_rank": 3})
    lines: list[str] = []
    with pytest.raises(StageFailed, match="stage pretrain ended without a result"):
        launch.run_stage(request, on_line=lines.append)
    assert sorted(line for line in lines if line.startswith("told")) == ["told 0 2 3 PASSIVE", "told 1 2 3 PASSIVE"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"fail": "no such file"}, r"stage pretrain ended with exit code 2: no such file\. Mend the test\."),
        ({"crash": "boom"}, r"stage pretrain ended with exit code 1: RuntimeError: boom\."),
    ],
)
def test_a_failure_is_one_line_with_the_stages_own_words(
    request_of: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, str], words: str
) -> None:
    plain(monkeypatch)
    scratch.behave(checkout, pretrain=how)
    request = request_of()
    with pytest.raises(StageFailed, match=words) as caught:
        launch.run_stage(request, on_line=lambda line: None)
    message = str(caught.value)
    assert not isinstance(caught.value, launch.StageKilled)
    assert "\n" not in message
    assert f"Log: runs/scratch/pretrain/{Path(request.output).name}/log.txt." in message
    assert "continues from its last complete checkpoint" in message
    assert load_result(Path(request.output)) is None


def test_a_failure_says_nothing_of_earlier_executions(
    request_of: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(monkeypatch)
    scratch.behave(checkout, pretrain={"fail": "the first cause"})
    with pytest.raises(StageFailed, match="the first cause"):
        launch.run_stage(request_of(), on_line=lambda line: None)
    (checkout / "stages" / "pretrain" / "__main__.py").write_text("raise SystemExit(9)")
    with pytest.raises(StageFailed) as caught:
        launch.run_stage(request_of(), on_line=lambda line: None)
    assert "exit code 9" in str(caught.value) and "first cause" not in str(caught.value)


def test_a_killed_rank_fails_the_stage_and_a_rerun_continues(request_of: Any, checkout: Path) -> None:
    scratch.behave(checkout, pretrain={"hold_after": 3})
    request = request_of(**{"parallel.world_size": 2})
    ranks: dict[str, int] = {}
    state = Path(request.output) / "checkpoint" / "state.json"

    def on_line(line: str) -> None:
        words = line.split()
        if len(words) == 5 and words[1] == "rank":
            ranks[words[2]] = int(words[4])

    def on_tick() -> None:
        if len(ranks) == 2 and state.exists():
            os.kill(ranks.pop("1"), signal.SIGKILL)

    with pytest.raises(launch.StageKilled, match="stage pretrain was killed by SIGKILL"):
        launch.run_stage(request, on_line=on_line, on_tick=on_tick)
    assert scratch.stage_processes(checkout) == []
    assert load_result(Path(request.output)) is None

    scratch.behave(checkout)
    lines: list[str] = []
    launch.run_stage(request, on_line=lines.append)
    resumed = next(line for line in lines if "continues at step" in line)
    assert int(resumed.split()[-1]) >= 2


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_an_exception_in_the_launcher_stops_the_ranks(request_of: Any, checkout: Path, kind: Any) -> None:
    scratch.behave(checkout, pretrain={"step_seconds": 30})
    seen: list[str] = []

    def on_tick() -> None:
        if len([line for line in seen if " rank " in line]) == 2:
            raise kind("enough")

    with pytest.raises(kind, match="enough"):
        launch.run_stage(request_of(**{"parallel.world_size": 2}), on_line=seen.append, on_tick=on_tick)
    assert scratch.stage_processes(checkout) == []


LAUNCHER = """
import pathlib, sys
from m1.run import folder
from m1.run.contract import StageRequest
from infra import launch
launch.run_stage(StageRequest.model_validate_json(pathlib.Path(sys.argv[1]).read_bytes()))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_survives_the_launching_process(request_of: Any, checkout: Path, number: signal.Signals) -> None:
    scratch.behave(checkout, pretrain={"step_seconds": 30})
    request = request_of(**{"parallel.world_size": 2})
    path = folder.prepare(request.run, request)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(path)],
        cwd=checkout,
        env=scratch.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    while len([p for p in scratch.stage_processes(checkout) if "-u" in p.info["cmdline"]]) < 2:
        assert launcher.poll() is None
        time.sleep(0.1)
    launcher.send_signal(number)
    launcher.communicate(timeout=60)
    scratch.wait_for(lambda: not scratch.stage_processes(checkout), what="no stage process")
    assert load_result(Path(request.output)) is None


def test_sigterm_where_nobody_handles_it_is_an_error_of_ours(request_of: Any, checkout: Path) -> None:
    scratch.behave(checkout, pretrain={"step_seconds": 30})
    seen: list[str] = []

    def on_tick() -> None:
        if seen:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        launch.run_stage(request_of(), on_line=seen.append, on_tick=on_tick)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert scratch.stage_processes(checkout) == []


def test_one_run_folder_is_run_by_one_launcher(
    request_of: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(monkeypatch)
    monkeypatch.setattr(launching, "GRACE_SECONDS", -10.0)  # do not wait for the other
    request = request_of()
    other = load_profile("scratch", overrides={"parallel.world_size": 1, "pretrain.train_steps": 2})
    with launching._lease(f"pretrain-{request.fingerprint[:16]}", "the test"):
        with pytest.raises(ServiceError, match="stage pretrain: another process is running it"):
            launch.run_stage(request, on_line=lambda line: None)
        assert not Path(request.output).exists()
        monkeypatch.setattr(launching, "GRACE_SECONDS", 20.0)
        assert (
            launch.run_stage(resolve("pretrain", other, scratch.nothing_missing), on_line=lambda line: None).after
            == 0.5
        )


def test_a_data_stage_runs_the_command_of_dvc_yaml(checkout: Path) -> None:
    settings = load_profile("scratch")
    dvc.ensure_profile("scratch")
    lines: list[str] = []
    result = launch.run_data_stage(settings, "corpus", lines.append)
    assert result.digest == lock.digest("corpus", "scratch") is not None
    assert dvc.status(["corpus@scratch"]) == {"corpus@scratch": []}
    log = (paths.STATE / "logs" / "scratch-corpus.txt").read_text()
    assert "python -m stages.corpus --profile scratch" in log

    scratch.behave(checkout, tokenizer={"fail": "no text"})
    with pytest.raises(StageFailed, match="stage tokenizer ended with exit code 2: no text"):
        launch.run_data_stage(settings, "tokenizer", lines.append)
    assert lock.digest("tokenizer", "scratch") is None
    assert not paths.data_dir("scratch", "tokenizer").exists(), "nothing half-written"


def test_a_profile_dvc_does_not_list_is_an_error_that_says_so(checkout: Path) -> None:
    with pytest.raises(UsageError, match=r"dvc.yaml lists no stage corpus@scratch"):
        launch.run_data_stage(load_profile("scratch"), "corpus", print)


def test_a_broken_dvc_yaml_is_named(checkout: Path) -> None:
    dvc.ensure_profile("scratch")
    (checkout / "dvc.yaml").write_text((checkout / "dvc.yaml").read_text() + "\n  broken: {nonsense: 1}\n")
    with pytest.raises(ServiceError, match=r"DVC: .*dvc.yaml"):
        dvc.status(["corpus@scratch"])
