"""Metric names, and what happens to metrics when the server dies."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.config.context_extension import ContextExtension
from m1.config.rl import Rl
from m1.errors import ServiceError
from m1.run.contract import StageContext
from m1.tracking import Tracker, kept
from m1.tracking.metrics import MAX_CURVES, MAX_KEYS, MetricKeys, metric_key


@given(st.text(max_size=400))
@settings(max_examples=300, deadline=None)
def test_every_key_becomes_one_that_mlflow_takes(raw):
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(metric_key(raw))


@given(st.text(alphabet="abcXYZ019_-. ", min_size=1, max_size=20).filter(lambda t: t.strip(". ") and t == t.strip()))
def test_good_keys_stay(raw):
    assert metric_key(f"train/{raw}") == f"train/{raw}"


@given(st.lists(st.text(max_size=6), unique=True, max_size=40))
def test_distinct_keys_stay_distinct(raws):
    keys = MetricKeys()
    names = [keys.name(raw, 100) for raw in raws]
    assert None not in names
    assert len(set(names)) == len(raws)


def test_number_of_keys_is_limited():
    keys = MetricKeys({"from/earlier"})
    names = [keys.name(f"k{index}", 10) for index in range(12)]
    assert sum(name is not None for name in names) == 9
    assert keys.name("from/earlier", 10) == "from/earlier"
    assert keys.left_out == {"k9", "k10", "k11"}


def test_too_many_keys(house, tracker):
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    request = house.request("pretrain")
    tracked = tracker.start_stage(flow, "pretrain", request)
    tracked.follow()
    StageContext(request).log_metrics(0, {f"layer/{index}": 1.0 for index in range(200)})
    tracked.finish(house.finish(request, metrics={"layer/0": 1.0} | {f"m{index}": 1.0 for index in range(100)}))
    run = tracker.client.get_run(tracked.run_id)
    assert len(run.data.metrics) == MAX_KEYS
    assert sum(key.startswith("layer/") for key in run.data.metrics) == MAX_CURVES
    assert {"key/before", "key/after", "seconds"} <= set(run.data.metrics)  # never those left out
    assert "final/m0" in run.data.metrics and "final/layer/0" not in run.data.metrics  # what is a curve can go
    assert "keys" in run.data.tags["metrics_left_out"]


def test_long_settings_fit(house):
    flat = kept.flatten(house.profile.to_dict())
    assert flat["context-extension.stages.0.sequence_length"] == str(
        house.profile.section("context-extension", ContextExtension).stages[0].sequence_length
    )
    assert json.loads(flat["rl-40k.windows"]) == house.profile.section("rl-40k", Rl).windows
    assert all(len(key) <= 250 and len(value) <= 6000 for key, value in flat.items())


def test_server_dies_and_comes_back(house, mortal_server):
    """Metrics of a dead server are an error at the end, not before; a server that is back gets every one of them."""
    tracker = Tracker.connect(mortal_server.uri)
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    request = house.request("pretrain")
    tracked = tracker.start_stage(flow, "pretrain", request, 1)
    tracked.follow()
    context = StageContext(request)
    context.log_metrics(0, {"train/loss": 1.0})
    mortal_server.kill()
    context.log_metrics(1, {"train/loss": 2.0})
    result = house.finish(request)
    with pytest.raises(ServiceError, match=r"did not take the metrics.*m1 up"):
        tracked.finish(result)
    tracked.fail("the server died")  # must not hide that error behind another
    with pytest.raises(ServiceError):
        tracker.finish_flow_run(flow, "FAILED", [])

    mortal_server.start()
    again = tracker.start_stage(flow, "pretrain", request, 2)
    assert again.run_id == tracked.run_id
    again.follow()
    again.fail("stopped before the checkpoint was registered")
    points = tracker.client.get_metric_history(again.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in points) == [(0, 1.0), (1, 2.0)]

    # The stage itself is complete: the next flow run skips it and makes up for the model version.
    later = tracker.start_flow_run(house.profile, "prefect-2", None)
    tracker.start_stage(later, "pretrain", request).skip(result, "unchanged")
    version = tracker.client.get_model_version_by_alias(f"m1-{house.profile.name}", "pretrain")
    assert (version.run_id, version.tags["git_commit"]) == (tracked.run_id, "none")


def test_a_stage_that_goes_on_takes_back_what_it_does_again(house, tracker):
    """Killed at step 7, going on after step 4: no step stands twice in metrics.jsonl or in MLflow, none is missing."""
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    request = house.request("pretrain")
    tracked = tracker.start_stage(flow, "pretrain", request)
    killed = StageContext(request)
    for step in range(1, 8):
        killed.log_metrics(step, {"train/loss": 1.0 / step})
        killed.log_metrics(step, {"heldout/loss": 2.0 / step})
        killed.progress(step, 9)
    file = killed.output / "metrics.jsonl"
    with open(file, "a", encoding="utf-8") as stream:
        stream.write('{"step": 8, "time": 1, "metr')
    tracked.follow()
    tracked._follower._pump()

    again = StageContext(request)
    again.continue_after(4)
    again.log_metrics(4, {"heldout/loss": 2.0 / 4})  # the end of step 4 is done once more
    for step in range(5, 10):
        again.log_metrics(step, {"train/loss": 1.0 / step})
        again.log_metrics(step, {"heldout/loss": 2.0 / step})
    tracked.finish(house.finish(request))
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    steps = [(line["step"], *line["metrics"]) for line in lines if "metrics" in line]
    assert steps == [(step, name) for step in range(1, 10) for name in ("train/loss", "heldout/loss")]
    for name, scale in (("train/loss", 1.0), ("heldout/loss", 2.0)):
        points = tracker.client.get_metric_history(tracked.run_id, name)
        assert [(point.step, point.value) for point in points] == [(step, scale / step) for step in range(1, 10)]
