"""Runs against a real server: what goes in comes out again."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path

import pytest
import yaml

from m1.config.pretrain import Pretrain
from m1.errors import ServiceError, UsageError
from m1.run import profiles
from m1.run import registry as stages
from m1.run.contract import StageContext, load_result
from m1.run.summary import StageRow
from m1.tracking import Tracker, records, registry, runs

pytestmark = pytest.mark.usefixtures("server")


def artifacts(tracker: Tracker, run_id: str, folder: str | None = None) -> set[str]:
    return {entry.path for entry in tracker.client.list_artifacts(run_id, folder)}


def history(tracker: Tracker, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in tracker.client.get_metric_history(run_id, key))


def test_nobody_answers():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nothing else can answer there
        with pytest.raises(ServiceError, match=r"no MLflow server answers .*m1 up"):
            Tracker.connect(f"http://127.0.0.1:{taken.getsockname()[1]}")


def test_round_trip(house, tracker):
    flow = tracker.start_flow_run(house.profile, "prefect-1", "http://prefect/run/1")
    request = house.request("pretrain")
    tracked = tracker.start_stage(flow, "pretrain", request)
    tracked.follow()
    context = StageContext(request)
    for step in range(700):  # two metrics a line: more than one request holds
        context.log_metrics(step, {"train/loss": 7 / (step + 1), "pass@1": 0.5})
    context.log_metrics(700, {"train/loss": math.nan, "pass@1": math.inf})
    result = house.finish(request, metrics={"tokens": 1e6, "bad": math.nan})
    tracked.finish(result)

    run = tracker.client.get_run(tracked.run_id)
    assert run.info.status == "FINISHED"
    assert history(tracker, tracked.run_id, "train/loss") == [(step, 7 / (step + 1)) for step in range(700)]
    assert len(history(tracker, tracked.run_id, "pass_at_1")) == 700
    assert run.data.metrics["final/tokens"] == 1e6
    assert (run.data.metrics["key/before"], run.data.metrics["key/after"]) == (3.0, 2.0)
    assert "final/bad" not in run.data.metrics
    assert run.data.tags["not_finite"].startswith("3 values: train/loss at step 700")

    tags = run.data.tags
    assert tags["mlflow.parentRunId"] == flow
    assert (tags["stage"], tags["profile"]) == ("pretrain", house.profile.name)
    assert (tags["fingerprint"], tags["prefect_run_id"]) == (request.fingerprint, "prefect-1")
    assert tags["git_commit"] == "none"  # the made-up checkout is not under git
    assert run.data.params["pretrain.train_steps"] == str(house.profile.section("pretrain", Pretrain).train_steps)
    assert run.data.params["model.hidden_size"] == str(house.profile.model.hidden_size)
    assert not any(key.startswith("sft.") for key in run.data.params)

    stored = tracker.client.download_artifacts(tracked.run_id, "profile.yaml")
    assert profiles.parse(yaml.safe_load(Path(stored).read_text(encoding="utf-8")), "stored") == house.profile
    assert {"profile.yaml", "result.json", "log.txt", "figures"} <= artifacts(tracker, tracked.run_id)
    assert artifacts(tracker, tracked.run_id, "figures") == {"figures/loss.png"}


def test_inputs_carry_dvc_hashes(house, tracker, run_stage):
    from mlflow.data.dataset_source_registry import get_dataset_source_from_json

    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    run_id, _ = run_stage(house, flow, "pretrain")
    logged = {entry.dataset.name: entry.dataset for entry in tracker.client.get_run(run_id).inputs.dataset_inputs}
    assert set(logged) == {f"{name}@{house.profile.name}" for name in ("tokenizer", "tokens")}
    for name in ("tokenizer", "tokens"):
        lock = records.locked(name, house.profile.name)
        assert logged[lock.name].digest == lock.digest
        source = get_dataset_source_from_json(logged[lock.name].source, logged[lock.name].source_type)
        assert source.record == lock
        assert source.load() == house.root / lock.path


def test_model_version_and_alias(house, tracker, run_stage):
    model = registry.model_name(house.profile.name)
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    _, pretrained = run_stage(house, flow, "pretrain")
    run_id, tuned = run_stage(house, flow, "sft", pretrained)
    parent = tracker.client.get_model_version_by_alias(model, "pretrain")
    version = tracker.client.get_model_version_by_alias(model, "sft")
    assert version.tags["fingerprint"] == tuned.fingerprint
    assert version.tags["path"] == str(tuned.request.run.relative_to(house.root))
    assert (version.tags["upstream_version"], version.tags["upstream_fingerprint"]) == (
        parent.version,
        pretrained.fingerprint,
    )
    assert version.tags["dvc.sft-data"] == records.locked("sft-data", house.profile.name).digest
    assert version.run_id == run_id
    run = tracker.client.get_run(run_id)
    assert run.data.tags["upstream_run"] == parent.run_id
    assert [entry.model_id for entry in run.inputs.model_inputs] == [registry.model_id(parent)]
    assert [entry.model_id for entry in run.outputs.model_outputs] == [registry.model_id(version)]


@pytest.mark.parametrize("name", stages.stages())
def test_every_stage_name_can_be_an_alias(name):
    from mlflow.utils.validation import _validate_model_alias_name, _validate_model_alias_name_reserved

    _validate_model_alias_name(name)
    _validate_model_alias_name_reserved(name)


def test_skip_points_the_alias_back(house, tracker, run_stage):
    model = registry.model_name(house.profile.name)
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    original, first = run_stage(house, flow, "pretrain")
    house.make_data("tokens", version=2)
    _, second = run_stage(house, flow, "pretrain")
    assert tracker.client.get_model_version_by_alias(model, "pretrain").tags["fingerprint"] == second.fingerprint

    house.make_data("tokens", version=1)
    later = tracker.start_flow_run(house.profile, "prefect-2", None)
    tracked = tracker.start_stage(later, "pretrain", house.request("pretrain"))
    tracked.skip(load_result(first.request.run), "unchanged")
    tags = tracker.client.get_run(tracked.run_id).data.tags
    assert (tags["skipped"], tags["skip_reason"], tags["original_run"]) == ("true", "unchanged", original)
    version = tracker.client.get_model_version_by_alias(model, "pretrain")
    assert version.tags["fingerprint"] == first.fingerprint
    assert len(tracker.client.search_model_versions(f"name = '{model}'")) == 2


def test_skip_registers_what_ran_outside_a_flow(house, tracker):
    request = house.request("pretrain")
    result = house.finish(request)
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    tracker.start_stage(flow, "pretrain", request).skip(result, "unchanged")
    version = tracker.client.get_model_version_by_alias(registry.model_name(house.profile.name), "pretrain")
    assert version.tags["fingerprint"] == result.fingerprint
    assert "git_commit" not in version.tags  # nobody noted it


def test_data_stage(house, tracker):
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    tracked = tracker.start_stage(flow, "tokens", None, 1)
    tracked.finish_data("tokens", house.profile)
    run = tracker.client.get_run(tracked.run_id)
    contexts = {entry.dataset.name: entry.tags[0].value for entry in run.inputs.dataset_inputs}
    name = house.profile.name
    assert contexts == {f"corpus@{name}": "input", f"tokenizer@{name}": "input", f"tokens@{name}": "output"}
    assert run.data.tags["dvc_digest"] == records.locked("tokens", name).digest
    assert (run.data.metrics["data/documents"], run.data.metrics["data/shares/prose"]) == (12.0, 0.25)
    assert "data/flag" not in run.data.metrics
    assert "summary.json" in artifacts(tracker, tracked.run_id)
    assert run.info.status == "FINISHED"


def test_data_stage_that_dvc_does_not_know(house, tracker):
    (house.root / "dvc.lock").unlink()
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    tracked = tracker.start_stage(flow, "corpus", None, profile=house.profile)
    with pytest.raises(UsageError, match=f"no entry for corpus@{house.profile.name}.*dvc commit"):
        tracked.finish_data("corpus", house.profile)


def test_second_attempt_continues_the_run(house, tracker):
    """A stage killed at step 5 goes on from its checkpoint at step 3: no step appears twice, none is lost."""
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    request = house.request("pretrain")
    first = tracker.start_stage(flow, "pretrain", request, 1)
    first.follow()
    context = StageContext(request)
    for step in range(6):
        context.log_metrics(step, {"train/loss": float(step)})
    with open(context.output / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6, "time": 1, "metr')  # cut by the kill
    first.fail("killed by SIGKILL")
    assert tracker.client.get_run(first.run_id).info.status == "FAILED"

    second = tracker.start_stage(flow, "pretrain", request, 2)
    assert second.run_id == first.run_id
    second.follow()
    with open(context.output / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("\n")
    for step in range(3, 10):
        context.log_metrics(step, {"train/loss": float(step), "train/new": 1.0})
    second.finish(house.finish(request))
    assert history(tracker, first.run_id, "train/loss") == [(step, float(step)) for step in range(10)]
    assert history(tracker, first.run_id, "train/new") == [(step, 1.0) for step in range(3, 10)]
    assert tracker.client.get_run(first.run_id).info.status == "FINISHED"


def test_dead_flow_runs_are_closed(house, tracker):
    dead = tracker.start_flow_run(house.profile, "prefect-1", None)
    nested = tracker.start_stage(dead, "pretrain", house.request("pretrain"))
    alive = tracker.start_flow_run(house.profile, "prefect-1", None)
    states = {run: tracker.client.get_run(run).info.status for run in (dead, nested.run_id, alive)}
    assert states == {dead: "KILLED", nested.run_id: "KILLED", alive: "RUNNING"}


def test_flow_summary(house, tracker):
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    rows = [
        StageRow("pretrain", "ran", "never run before", 90.0, 80.0, key_metric="loss", before=7.0),
        StageRow("sft", "skipped", "unchanged"),
    ]
    tracker.finish_flow_run(flow, "FINISHED", rows, total_seconds=100.0)
    run = tracker.client.get_run(flow)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["orchestration_share"] == pytest.approx(0.1)
    assert (run.data.metrics["stages_run"], run.data.metrics["stages_skipped"]) == (1, 1)
    stored = json.loads(Path(tracker.client.download_artifacts(flow, "summary.json")).read_text(encoding="utf-8"))
    assert [StageRow.from_json(row) for row in stored["stages"]] == rows
    table = Path(tracker.client.download_artifacts(flow, "summary.md")).read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if line.startswith("|") and "pretrain" in line)
    assert all(said in row for said in ("loss", "1 min 30 s", "7")), row


def test_find_run(house, tracker, run_stage):
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    run_id, result = run_stage(house, flow, "pretrain")
    folder = result.request.run
    name = tracker.client.get_run(run_id).info.run_name
    for reference in (run_id, run_id[:10], name, f"m1-{house.profile.name}@pretrain"):
        assert tracker.find_run(reference, house.profile) == folder
    listing = f"m1-{house.profile.name}@pretrain \\(run {run_id[:8]}\\)"
    for reference in ("nothing", "", run_id[:3], flow, f"m1-{house.profile.name}@sft", "other@pretrain", "m1-x@v1"):
        with pytest.raises(UsageError, match=listing):
            tracker.find_run(reference, house.profile)
    (folder / "result.json").unlink()
    with pytest.raises(UsageError, match="no finished result"):
        tracker.find_run(run_id, house.profile)


def test_prefix_of_several_runs_is_refused(house, tracker, monkeypatch):
    monkeypatch.setattr(runs, "SHORTEST_RUN_ID", 1)
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    experiment = tracker.client.get_run(flow).info.experiment_id
    ids: list[str] = []
    while len({i[0] for i in ids}) == len(ids):  # until two ids share their first digit: 17 at the latest
        tags = {"fingerprint": "f", "path": f"runs/{len(ids)}"}
        ids.append(tracker.client.create_run(experiment, tags=tags).info.run_id)
    with pytest.raises(UsageError, match="matches several runs"):
        tracker.find_run(ids[-1][0], house.profile)


@pytest.mark.parametrize(("told", "version"), [("FAILED", 1), ("KILLED", 2), ("RUNNING", 3)])
def test_a_stage_that_was_done_when_its_flow_died_is_finished_by_the_next_one(house, tracker, told, version):
    house.make_data("tokens", version)  # the three may share an experiment, and must not share a fingerprint
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    request = house.request("pretrain")
    tracked = tracker.start_stage(flow, "pretrain", request)
    tracked.follow()
    context = StageContext(request)
    for step in range(4):
        context.log_metrics(step, {"train/loss": float(step)})
    if told == "RUNNING":
        tracked._follower.stop()
    else:
        tracked.fail("stopped by something", killed=told == "KILLED")
        tracker.finish_flow_run(flow, told, [])
    for step in range(4, 10):
        context.log_metrics(step, {"train/loss": float(step)})
    result = house.finish(request)
    assert tracker.client.get_run(tracked.run_id).info.status == told

    tracker.start_flow_run(house.profile, "prefect-2", None)
    run = tracker.client.get_run(tracked.run_id)
    assert run.info.status == "FINISHED" and "error" not in run.data.tags and run.data.tags["state"] == "ran"
    assert run.info.end_time == int(result.finished_at * 1000)
    assert history(tracker, run.info.run_id, "train/loss") == [(step, float(step)) for step in range(10)]
    version = tracker.client.get_model_version_by_alias(registry.model_name(house.profile.name), "pretrain")
    assert version.run_id == run.info.run_id
    status = tracker.client.get_run(flow).info.status
    assert status == (told if told != "RUNNING" else "KILLED"), "the flow run itself did not finish"


def test_a_failed_try_stays_failed_where_a_later_run_did_the_work(house, tracker, run_stage):
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    failed = tracker.start_stage(flow, "pretrain", house.request("pretrain"))
    failed.fail("killed by SIGKILL")
    later = tracker.start_flow_run(house.profile, "prefect-2", None)
    did, _ = run_stage(house, later, "pretrain")
    tracker.start_flow_run(house.profile, "prefect-3", None)
    assert tracker.client.get_run(failed.run_id).info.status == "FAILED"
    assert tracker.client.get_run(did).info.status == "FINISHED"


def test_what_runs_under_a_dead_flow_is_closed_and_a_live_one_left_alone(house, tracker):
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    stage = tracker.start_stage(flow, "pretrain", house.request("pretrain"))
    tracker.close_dead({"prefect-1"})  # the server has the runs of other tests as well
    assert tracker.client.get_run(flow).info.status == "RUNNING"
    name = tracker.client.get_run(flow).info.run_name
    assert name in tracker.close_dead({"prefect-2"})
    assert {tracker.client.get_run(run).info.status for run in (flow, stage.run_id)} == {"KILLED"}
    assert name not in tracker.close_dead(())
