"""A run that is complete is taken for complete only as long as the files that it left are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import scratch
from test_plan import AFTER_DATA, execute, make_data

from flows import plan as planning
from infra.launch import run_stage
from m1.cli.tables import copy_export
from m1.config.profile import Profile
from m1.errors import UsageError
from m1.files import remove
from m1.run.contract import StageContext, StageRequest, fault_of, finished, load_result, newest_run
from m1.run.resolve import resolve


@pytest.fixture
def settings(checkout: Path, clock: list[float]) -> Profile:
    """A profile of which everything up to the export is complete; export has left a model of two files."""
    make_data(checkout)
    made = planning.load_profile("scratch")
    execute(made, clock, stop="export")
    export(made)
    return made


def export(made: Profile) -> StageRequest:
    request = resolve("export", made, scratch.nothing_missing)
    context = StageContext(request)
    model = context.output / "model"
    model.mkdir(exist_ok=True)
    (model / "model.safetensors").write_bytes(bytes(1000))
    (model / "config.json").write_text("{}")
    (context.output / "log.txt").write_text("a line")
    context.finish(checkpoint=model, key_metric="difference", before=None, after=0.0, metrics={})
    return request


def decision(settings: Profile, stage: str) -> tuple[str, str]:
    (row,) = planning.plan(settings, only=[stage])
    return row.action, row.reason


def test_whole_runs_are_up_to_date(settings: Profile) -> None:
    assert [row.action for row in planning.plan(settings, only=AFTER_DATA)] == ["skip"] * len(AFTER_DATA)
    result = load_result(resolve("export", settings, scratch.nothing_missing).run)
    assert result is not None and sorted(result.files) == ["model/config.json", "model/model.safetensors"]


def flip(file: Path) -> None:
    file.write_bytes(bytes(999) + b"\1")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (Path.unlink, "model/model.safetensors is gone"),
        (flip, "model/model.safetensors has changed"),
        (lambda file: file.write_bytes(b""), "model/model.safetensors has changed"),
        (lambda file: remove(file.parent), "model is gone"),
    ],
)
def test_a_damaged_export_is_made_again_and_never_delivered(
    settings: Profile, tmp_path: Path, damage: Callable[[Path], None], fault: str
) -> None:
    run = newest_run("scratch", "export")
    assert run is not None
    damage(run / "model" / "model.safetensors")
    assert decision(settings, "export") == ("run", f"damaged: {fault}")
    with pytest.raises(UsageError, match=f"damaged: {fault}.*m1 run --profile scratch --only export"):
        copy_export("scratch", tmp_path / "delivered")
    assert list(tmp_path.glob("delivered*")) == [] and list(tmp_path.glob(".delivered*")) == []
    export(settings)
    assert decision(settings, "export")[0] == "skip"
    copy_export("scratch", tmp_path / "delivered")
    assert (tmp_path / "delivered" / "model.safetensors").stat().st_size == 1000


def test_files_of_the_contract_itself_may_change(settings: Profile) -> None:
    run = newest_run("scratch", "export")
    assert run is not None
    (run / "log.txt").write_text("another line")
    assert decision(settings, "export")[0] == "skip"


def test_a_training_stage_without_its_checkpoint_runs_again(settings: Profile) -> None:
    request = resolve("sft", settings, scratch.nothing_missing)
    remove(request.run / "checkpoint")
    assert finished(request) is None
    assert decision(settings, "sft") == ("run", "damaged: checkpoint is gone")
    result = run_stage(request, on_line=lambda line: None)
    assert fault_of(result) is None and finished(request) == result


def test_the_newest_run_is_the_last_one_whatever_the_clock_says(
    settings: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = newest_run("scratch", "export")
    monkeypatch.setattr("time.time", lambda: 5.0)
    later = export(planning.load_profile("scratch", overrides={"export.check_tokens": 9}))
    assert first != later.run and newest_run("scratch", "export") == later.run
