"""What cannot run is refused: by the plan once it is printed, by a run and by a stage before they begin."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scratch
from test_plan import AFTER_DATA, execute, make_data
from typer.testing import CliRunner, Result

from flows import plan as planning
from infra import machine, services, stage_command, tools
from infra.sandbox import engine
from m1.cli import run as running
from m1.cli.app import app
from m1.errors import ServiceError, UsageError
from m1.planning import preflight

TP2 = "parallel.tensor_model_parallel_size=2"
WORDS = "rl-40k: parallel.tensor_model_parallel_size=2, but rollouts need the whole model on every rank"
#: Tasks that need an engine, by a profile that does not want to go without.
STRICT: dict[str, Any] = {
    "synthesize__swe": {"faults_per_package": 2, "question_length": 500, "when_no_engine": "fail"},
    "rl_40k__swe": {"share": 0.5, "max_prompt_length": 600},
}


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", "--profile", "scratch", *arguments], env={"COLUMNS": "100"})


def parameters(**more: Any) -> dict[str, Any]:
    """What `m1 run` hands to the flow."""
    names = ("start", "stop", "only", "upstream", "seed", "overrides")
    return {"profile": "scratch", "force": False, **dict.fromkeys(names), **more}


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`m1 run` must not come as far as the services. It takes SIGTERM for itself, which is undone."""

    def up(say: object) -> None:
        raise AssertionError("services were started")

    monkeypatch.setattr(services, "up", up)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> list[ServiceError | None]:
    """What the sandbox's engine answers: none there, at first."""
    said: list[ServiceError | None] = [ServiceError("no Docker engine answers", "Start one.")]
    monkeypatch.setattr(engine, "missing", lambda: said[0])
    return said


def stage_ends(package: str, *arguments: str) -> int:
    """The exit code of `python -m <package> --profile scratch`."""
    with pytest.raises(SystemExit) as ended:
        stage_command.main(package, ["--profile", "scratch", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


# --- what this version cannot do ---


def test_the_plan_is_printed_and_then_refused(checkout: Path) -> None:
    done = plan("--set", TP2)
    assert isinstance(done.exception, UsageError) and done.exception.exit_code == 2
    assert str(done.exception).startswith(WORDS) and "rl-80k: parallel.tensor" in str(done.exception)
    assert "12 to run" in done.stdout and "memory of the fullest rank" in done.stdout


def test_a_plan_of_other_stages_is_not(checkout: Path) -> None:
    done = plan("--set", TP2, "--stop", "context-extension")
    assert done.exit_code == 0, done.output


def test_a_run_is_refused_before_any_service_is_started(checkout: Path) -> None:
    done = scratch.m1(checkout, "run", "--profile", "scratch", "--set", TP2, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {WORDS}") and done.stderr.count("\n") == 1
    assert not (checkout / ".m1" / "services").exists() and not (checkout / "runs").exists()


def test_a_stage_alone_is_refused(checkout: Path, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    make_data(checkout)
    scratch.write_profile(checkout, parallel__tensor_model_parallel_size=2)
    execute(planning.load_profile("scratch"), clock, stop="rl-40k")
    for name in ("rl-40k", "rl-80k"):
        assert stage_ends("stages.rl", "--stage", name) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {WORDS.replace('rl-40k', name)}") and said.count("\n") == 1
    assert not (checkout / "runs" / "scratch" / "rl-40k").exists()


@pytest.mark.parametrize(
    "size", ["tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"]
)
def test_every_way_to_split_the_model_is_refused_for_rl_alone(checkout: Path, size: str) -> None:
    settings = planning.load_profile("scratch", overrides={f"parallel.{size}": 2})
    assert preflight.refusals(settings, [name for name in settings.order if not name.startswith("rl-")]) == []
    (refused,) = preflight.refusals(settings, ["rl-80k"])
    assert refused.startswith(f"rl-80k: parallel.{size}=2")


def test_a_stage_that_the_profile_does_not_ask_for(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = [name for name in planning.load_profile("scratch").order if name != "rl-80k"]
    scratch.write_profile(checkout, order=order)
    assert stage_ends("stages.rl", "--stage", "rl-80k") == 2
    assert capsys.readouterr().err.startswith("error: profile scratch does not ask for rl-80k. Put it into the order")


# --- memory ---


def test_memory_that_no_rank_has(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nothing_starts: None
) -> None:
    words = r"pretrain: the fullest rank would need [\d.]+ GB of 0.001 GB \(a reserve of 8% kept\); `m1 plan --layouts`"
    done = plan("--gpu-memory", "0.001", "--stop", "pretrain")
    assert "memory of the fullest rank" in done.stdout and isinstance(done.exception, UsageError)
    with pytest.raises(UsageError, match=words):
        raise done.exception
    monkeypatch.setattr(machine, "memory_of_rank", lambda parallel: 1e6)
    with pytest.raises(UsageError, match=words):
        running.run(parameters(only=["pretrain"]))
    assert stage_ends("stages.pretrain") == 2
    assert "the fullest rank would need" in capsys.readouterr().err
    settings = planning.load_profile("scratch")
    assert preflight.refusals(settings, ["corpus", "evaluate", "export"], 1e6) == [], "no optimizer steps"
    assert preflight.refusals(settings, settings.order, 80e9) == []


def test_memory_of_a_rank_is_its_share_where_there_is_no_gpu(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = planning.load_profile("scratch")
    one, two = (settings.parallel.model_copy(update={"world_size": size}) for size in (1, 2))
    monkeypatch.setattr(machine, "gpu_memory", lambda: [])
    assert machine.memory_of_rank(one) == 2 * machine.memory_of_rank(two) > 0
    monkeypatch.setattr(machine, "gpu_memory", lambda: [80e9, 40e9])
    assert machine.memory_of_rank(one) == machine.memory_of_rank(two) == 40e9


# --- an engine that the profile does not go without ---


def test_a_plan_needs_no_engine_and_says_where_a_run_would_stop(
    checkout: Path, answer: list[ServiceError | None]
) -> None:
    scratch.write_profile(checkout, **STRICT)
    done = plan()
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("note: a run would stop here: synthesize, rl-40k: no Docker engine answers")
    assert done.stderr.endswith("Start one.\n") and done.stderr.count("\n") == 1
    answer[0] = None
    assert plan().stderr == ""


def test_a_run_is_refused_without_it_with_its_own_code(
    checkout: Path, answer: list[ServiceError | None], nothing_starts: None
) -> None:
    scratch.write_profile(checkout, **STRICT)
    with pytest.raises(
        ServiceError, match=r"synthesize, rl-40k: no Docker engine answers, and .* tasks of swe\. Start one"
    ) as caught:
        running.run(parameters())
    assert caught.value.exit_code == 4
    with pytest.raises(AssertionError, match="services were started"):  # nothing in the way of these stages
        running.run(parameters(stop="sft"))


def test_a_stage_alone_is_refused_without_it(
    checkout: Path, clock: list[float], answer: list[ServiceError | None], capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(checkout)
    scratch.write_profile(checkout, **STRICT)
    execute(planning.load_profile("scratch"), clock, stop="rl-40k")
    for package in ("stages.synthesize", "stages.rl"):
        assert stage_ends(package) == 4
        said = capsys.readouterr().err
        assert (
            "no Docker engine answers, and the profile does not let a run go without" in said and said.count("\n") == 1
        )


def test_what_is_done_needs_it_no_more(
    checkout: Path, clock: list[float], answer: list[ServiceError | None], nothing_starts: None
) -> None:
    make_data(checkout)
    scratch.write_profile(checkout, **STRICT)
    settings = planning.load_profile("scratch")
    assert execute(settings, clock) == AFTER_DATA  # at a time when an engine answered
    assert preflight.unmet(settings, ["rl-40k"], tools.missing) != []
    stage_command.main("stages.rl", ["--profile", "scratch"])
    done = plan("--only", "rl-40k", "--only", "rl-80k")
    assert (done.exit_code, done.stderr) == (0, "") and "0 to run" in done.stdout
    with pytest.raises(AssertionError, match="services were started"):
        running.run(parameters(only=["rl-40k", "rl-80k"]))
    with pytest.raises(ServiceError, match="rl-40k: no Docker engine answers"):
        running.run(parameters(only=["rl-40k"], force=True))
