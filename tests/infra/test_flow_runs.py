"""What a flow run tells those who watch it: events and summary rows come back as they were written."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import flow_runs
from infra.flow_runs import Event, EventKind, PlannedStage
from m1 import paths
from m1.run.summary import StageRow

ROW = StageRow(
    stage="sft",
    status="ran",
    reason="profile: sft.epochs 1.0 -> 2.0",
    seconds=12.25,
    inside_seconds=9.5,
    key_metric="held-out loss",
    before=3.0,
    after=0.5,
    output="runs/tiny/sft/0123",
    checkpoint="checkpoint",
    left_out=("swe: no engine", "a line\u2028that others would cut"),
    mlflow_run="f" * 32,
)
PLAN = (PlannedStage("corpus", "skip", "unchanged"), PlannedStage("sft", "run", "never run"))
EVENTS = [
    Event("planned", plan=PLAN, mlflow_url="http://127.0.0.1:5000/#/experiments/1"),
    Event("started", stage="sft"),
    Event("stage running", stage="sft", message="never run", output="/somewhere/runs/tiny/sft/0123"),
    Event("stage killed", stage="sft", message="stage sft was killed by SIGKILL"),
    Event("stage ended", stage="sft", row=ROW),
    Event("failed", message="no \u00e9ngine\nanswers"),
    Event("finished"),
]


def timeless(events: list[Event]) -> list[Event]:
    return [dataclasses.replace(event, time=0.0) for event in events]


def test_events_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert {event.kind for event in EVENTS} == set(typing.get_args(EventKind)), "one of every kind"
    assert flow_runs.read_events(tmp_path) == []
    for count, event in enumerate(EVENTS, 1):
        flow_runs.write_event(tmp_path, event)
        assert timeless(flow_runs.read_events(tmp_path)) == EVENTS[:count]
    times = [event.time for event in flow_runs.read_events(tmp_path)]
    assert times == sorted(times) and times[0] > 0


def test_a_line_that_is_being_written_is_left_for_the_next_look(tmp_path: Path) -> None:
    for event in EVENTS:
        flow_runs.write_event(tmp_path, event)
    file = tmp_path / "events.jsonl"
    whole = file.read_bytes()
    ends = [position for position, byte in enumerate(whole) if byte == ord("\n")]
    for position in range(len(whole)):
        file.write_bytes(whole[:position])
        complete = sum(end <= position for end in ends)  # a line is whole as soon as its last brace is there
        assert timeless(flow_runs.read_events(tmp_path)) == EVENTS[:complete]
    file.write_bytes(whole)
    assert timeless(flow_runs.read_events(tmp_path)) == EVENTS


def test_a_run_is_registered_with_the_process_that_serves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "STATE", tmp_path / ".m1")
    assert list(flow_runs.recorded()) == [] and flow_runs.process_of("abc") is None
    folder = flow_runs.register("abc")
    (found,) = flow_runs.recorded()
    assert (found.identity, found.folder) == ("abc", folder)
    assert found.process.pid == os.getpid() and found.process.alive()
    assert flow_runs.process_of("abc") == found.process
    (folder / "process.json").write_text("{")
    assert list(flow_runs.recorded()) == [], "half a pid file is no process"


texts = st.text()
numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.builds(
        StageRow,
        stage=texts,
        status=st.sampled_from(["ran", "skipped", "failed"]),
        reason=texts,
        seconds=numbers,
        inside_seconds=numbers,
        key_metric=st.none() | texts,
        before=st.none() | numbers,
        after=st.none() | numbers,
        output=st.none() | texts,
        checkpoint=st.none() | texts,
        left_out=st.lists(texts).map(tuple),
        mlflow_run=st.none() | texts,
    )
)
def test_a_summary_row_comes_back_as_it_was_written(row: StageRow) -> None:
    assert StageRow.from_json(json.loads(json.dumps(row.to_json()))) == row
    assert set(row.to_json()) == {field.name for field in dataclasses.fields(StageRow)}


def test_a_row_of_another_form_is_refused() -> None:
    for wrong in ({"status": "done"}, {"seconds": "long"}, {"left_out": "swe"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            StageRow.from_json({**ROW.to_json(), **wrong})
    with pytest.raises(ValueError, match="reason"):
        StageRow.from_json({"stage": "sft", "status": "ran"})
