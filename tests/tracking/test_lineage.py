"""The tree from a model to every input."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict

import pytest
from rich.console import Console

from m1.errors import UsageError
from m1.formats.folder import inspect
from m1.formats.layouts import minimax_m1_config
from m1.run import profiles
from m1.run.stage import Origin
from m1.tracking import lineage, lineage_dict, records


@pytest.fixture
def chain(house, tracker, run_stage):
    """pretrain -> sft, after every data stage has been recorded."""
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    for data in ("corpus", "tokenizer", "tokens", "sft-data"):
        tracker.start_stage(flow, data, None, 1).finish_data(data, house.profile)
    _, pretrained = run_stage(house, flow, "pretrain")
    _, tuned = run_stage(house, flow, "sft", pretrained)
    return pretrained, tuned


def text_of(tree) -> str:
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(tree)
    return console.export_text()


def test_a_base_model_is_where_the_tree_ends(house, tracker, run_stage, tmp_path):
    """A stage that starts from a folder of weights names it with its digest, in the run and on the model."""
    model = house.profile.model
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(minimax_m1_config(model, model.rotary_base, "float32")))
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    values = house.profile.to_dict()
    values["pretrain"]["init_from"] = str(base)
    house.profile = profiles.parse(values, "test")

    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    for data in ("corpus", "tokenizer", "tokens"):
        tracker.start_stage(flow, data, None, 1).finish_data(data, house.profile)
    _, result = run_stage(house, flow, "pretrain")
    made_of = result.request.origin
    assert made_of == Origin(str(base), inspect(base, model).digest)
    node = lineage_dict(tracker, f"m1-{house.profile.name}@pretrain")
    assert (node["base"], node["parent"]) == (asdict(made_of), None)
    text = text_of(lineage(tracker, f"m1-{house.profile.name}@pretrain"))
    assert made_of.folder in text and made_of.digest in text and "from scratch" not in text


def test_back_to_every_hash(house, tracker, chain):
    pretrained, tuned = chain
    model = f"m1-{house.profile.name}"
    node = lineage_dict(tracker, f"{model}@sft")
    json.dumps(node)
    assert (node["stage"], node["fingerprint"], node["aliases"]) == ("sft", tuned.fingerprint, ["sft"])
    assert (node["prefect_run_id"], node["git_commit"], node["missing"]) == ("prefect-1", "none", [])
    parent = node["parent"]
    assert (parent["stage"], parent["fingerprint"], parent["parent"]) == ("pretrain", pretrained.fingerprint, None)

    tokens = next(data for data in parent["data"] if data["name"].startswith("tokens@"))
    corpus = next(data for data in tokens["data"] if data["name"].startswith("corpus@"))
    lock = records.locked("corpus", house.profile.name)
    assert (corpus["digest"], corpus["in_dvc_lock"], corpus["recorded_in"]) == (lock.digest, "same", "MLflow")
    assert corpus["deps"] == [{"path": "stages/corpus", "md5": "1" * 32 + ".dir"}]
    assert corpus["sources"][0]["sha256"] == "5" * 64

    text = text_of(lineage(tracker, f"{model}@sft"))
    names = ("corpus", "tokenizer", "tokens", "sft-data")
    expected = [records.locked(name, house.profile.name).digest for name in names]
    expected += [pretrained.fingerprint, tuned.fingerprint, "prefect-1", "stages/corpus", "5" * 64, "MIT"]
    assert all(word in text for word in expected)
    assert "missing" not in text
    assert text.count("stages/corpus md5") == 1  # told once, referred to after that
    assert lineage_dict(tracker, f"{model}/{node['version']}") == node
    assert lineage_dict(tracker, f"{model}/{node['run_id'][:12]}") == node


def test_old_hash_is_still_explained(house, tracker, chain):
    """dvc.lock moves on; what a finished model read stays on record."""
    old = records.locked("tokens", house.profile.name).digest
    house.make_data("corpus", version=2)
    new = house.make_data("tokens", version=2)
    parent = lineage_dict(tracker, f"m1-{house.profile.name}@sft")["parent"]
    tokens = next(data for data in parent["data"] if data["name"].startswith("tokens@"))
    assert (tokens["digest"], tokens["in_dvc_lock"], tokens["missing"]) == (old, f"now {new}", [])


def test_missing_pieces_are_named(house, tracker, run_stage):
    """A data set that neither MLflow nor dvc.lock explains, a parent that was never recorded, a folder that is gone."""
    pretrained = house.finish(house.request("pretrain"))  # outside a flow
    flow = tracker.start_flow_run(house.profile, "prefect-1", None)
    request = house.request("sft", pretrained)
    house.make_data("sft-data", version=2)  # between the request and the start of the stage
    tracked = tracker.start_stage(flow, "sft", request)
    result = house.finish(request)
    tracked.finish(result)
    shutil.rmtree(result.request.run)
    node = lineage_dict(tracker, f"m1-{house.profile.name}@sft")
    assert node["missing"] == [f"run folder {records.relative(result.request.output)}"]
    assert node["parent"]["missing"] == [f"the pretrain run {pretrained.fingerprint[:16]}"]
    lost = next(data for data in node["data"] if data["name"].startswith("sft-data@"))
    assert "neither MLflow nor dvc.lock" in lost["missing"][0]
    text = text_of(lineage(tracker, f"m1-{house.profile.name}@sft"))
    assert text.count("missing: ") == 3


def test_unknown_model_lists_what_there_is(house, tracker, chain):
    for reference in ("nonsense", f"m1-{house.profile.name}@rl-80k", f"m1-{house.profile.name}/99", "a@b@c", ""):
        with pytest.raises(UsageError, match=f"m1-{house.profile.name}@sft"):
            lineage_dict(tracker, reference)
