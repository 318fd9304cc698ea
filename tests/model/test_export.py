"""The export stage on a real checkpoint, a trained tokenizer and indexed tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from small_model import ALONE, SMALL

from m1 import arithmetic, profile
from m1.errors import StageFailed, UsageError
from m1.stage import StageContext, StageRequest, StageResult, load_result, write_json

MODEL = SMALL.model_copy(update={"vocab_size": 400, "max_position_embeddings": 4096})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A parent run with a checkpoint, a tokenizer and held-out tokens, as the earlier stages leave them."""
    from m1.model.hybrid import build_model
    from m1.tokenizer import load_tokenizer
    from m1.training import checkpoint, parallel
    from stages.tokenizer import train
    from stages.tokens.split import Document
    from stages.tokens.write import write_indexed

    root = tmp_path_factory.mktemp("export")
    (root / "tokenizer").mkdir()
    (root / "tokens").mkdir()
    text = Path(json.__file__).read_text()
    train.save(train.train([text], MODEL.vocab_size), root / "tokenizer")
    (root / "tokenizer" / "summary.json").write_text("{}")
    documents = [Document("code", text[:300]), Document("code", text)]
    write_indexed(documents, load_tokenizer(root / "tokenizer"), root / "tokens" / "heldout")
    parent = root / "runs" / "sft" / "0123"
    parent.mkdir(parents=True)
    parallel.initialize(ALONE, 1)
    model = build_model(MODEL, ALONE, seed=5, rotary_base=30_000.0)
    checkpoint.save(parent / "checkpoint", model, None, {"rotary_base": 30_000.0})
    result = StageResult(
        stage="sft", fingerprint="0123" * 16, request={"history": []}, checkpoint="checkpoint",
        key_metric="loss", before=3.0, after=2.0, metrics={},
    )  # fmt: skip
    write_json(parent / "result.json", vars(result))
    return root


def context(inputs: Path, output: Path, **overrides) -> StageContext:
    values = profile.load("tiny", overrides={"export.check_tokens": 400, **overrides}).to_dict()
    values["model"] = {**MODEL.model_dump(mode="json"), **{k[6:]: v for k, v in overrides.items() if k[:6] == "model."}}
    parent = inputs / "runs" / "sft" / "0123"
    return StageContext(
        StageRequest(
            stage="export", profile=values, fingerprint="ab" * 32, output=str(output),
            data={name: str(inputs / name) for name in ("tokenizer", "tokens")},
            data_digests={"tokenizer": "t1", "tokens": "t2"},
            parent=str(parent), parent_stage="sft", history=[["sft", str(parent)]],
        )
    )  # fmt: skip


def execute(context: StageContext) -> StageResult:
    from stages.export.__main__ import run

    return run(context)


@pytest.fixture(scope="module")
def exported(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported")
    return output, execute(context(inputs, output))


def test_result_and_files(exported):
    output, result = exported
    assert load_result(output) == result
    assert result.checkpoint == "model"
    assert result.key_metric == "max |logprob difference|"
    assert result.before is None and 0 < result.after < 1e-4
    names = {file.name for file in (output / "model").iterdir()}
    assert names == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not list(output.glob(".model*"))


def test_weights_are_the_trained_weights(exported, inputs):
    """Read with safetensors alone, under the names of the released checkpoint."""
    from safetensors.torch import load_file

    from m1.training.checkpoint import load_model

    trained = dict(load_model(inputs / "runs/sft/0123/checkpoint", MODEL, ALONE).named_parameters())
    weights = load_file(exported[0] / "model" / "model.safetensors")
    assert sum(w.nbytes for w in weights.values()) == arithmetic.checkpoint_bytes(MODEL, precision="fp32")
    gate_up = trained["decoder.layers.3.mlp.experts.local_experts.2.linear_fc1.weight"]
    assert torch.equal(weights["model.layers.3.block_sparse_moe.experts.2.w1.weight"], gate_up[: len(gate_up) // 2])
    assert torch.equal(weights["model.layers.3.block_sparse_moe.experts.2.w3.weight"], gate_up[len(gate_up) // 2 :])
    assert torch.equal(weights["lm_head.weight"], trained["output_layer.weight"])


def test_card_states_what_matters(exported):
    card = (exported[0] / "model" / "README.md").read_text()
    for needed in ("proportional", "0123012301230123", "BSD-3-Clause", "float32", "9e+08", "position_ids", "`t2`"):
        assert needed in card


def test_usage_snippet_of_the_card_runs(exported, monkeypatch, capsys):
    folder = exported[0] / "model"
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    exec(compile(code.replace("256", "4"), "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_a_difference_leaves_nothing(inputs, tmp_path, monkeypatch):
    """A conversion without the reordering of rotary channels is caught, and nothing is left that looks exported."""
    from m1.model import convert

    monkeypatch.setattr(convert, "rotary_order", lambda model: torch.arange(model.head_dim))
    with pytest.raises(StageFailed, match=r"prefill .* more than export.tolerance=0.0001"):
        execute(context(inputs, tmp_path))
    assert load_result(tmp_path) is None
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".model*"))


def test_not_a_number_is_a_difference():
    from stages.export.check import Comparison, require

    require(Comparison(10, 1e-5, 1e-5, 0.0, ""), 1e-4)
    with pytest.raises(StageFailed, match="decode nan"):
        require(Comparison(10, 1e-5, float("nan"), 0.0, ""), 1e-4)
    with pytest.raises(StageFailed, match="greedy"):
        require(Comparison(10, 1e-5, 1e-5, 3e-4, ""), 1e-4)


def test_bad_inputs_are_refused(inputs, tmp_path):
    with pytest.raises(UsageError, match="lightning_norm_epsilon"):
        execute(context(inputs, tmp_path, **{"model.lightning_norm_epsilon": 1e-5}))
    with pytest.raises(UsageError, match="check_tokens=1000000"):
        execute(context(inputs, tmp_path, **{"export.check_tokens": 1_000_000}))
    assert not (tmp_path / "model").exists()


def test_tokenizer_of_another_model_is_refused(inputs, tmp_path, hybrid):
    """The small hybrid has 320 tokens, the tokenizer 400."""
    from stages.export import files

    settings = context(inputs, tmp_path).profile.model_copy(update={"model": SMALL})
    with pytest.raises(UsageError, match="has 400 tokens"):
        files.write(tmp_path / "model", hybrid, settings, inputs / "tokenizer")


def test_bfloat16_keeps_router_and_head_in_float32(exported, inputs, tmp_path):
    """What a bfloat16 profile stores is what was trained: bfloat16, router and head float32."""
    from safetensors.torch import load_file

    from m1.model.hybrid import build_model
    from stages.export import files

    settings = context(inputs, tmp_path, **{"parallel.precision": "bf16"}).profile
    trained = build_model(MODEL, settings.parallel.model_copy(update={"world_size": 1}), seed=5)
    size = files.write(tmp_path / "model", trained, settings, inputs / "tokenizer")
    assert size == arithmetic.checkpoint_bytes(MODEL, precision="bf16", float32_head=True)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    wide = {name for name, weight in weights.items() if weight.dtype == torch.float32}
    assert wide == {
        name for name in weights if name == "lm_head.weight" or name.endswith("block_sparse_moe.gate.weight")
    }


def test_module_runs_alone():
    """`python -m stages.export` is the entry point that the flow starts."""
    from m1.stage import STAGE_INFO

    assert STAGE_INFO["export"].module == "stages.export"
    assert "tokens" in profile.READS["export"]
    import stages.export.__main__ as entry

    assert sys.modules[entry.run.__module__].__package__ == "stages.export"
