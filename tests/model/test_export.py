"""The export stage on a real checkpoint, a trained tokenizer and indexed tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_model import ALONE, SMALL

from m1.errors import StageFailed, UsageError
from m1.files import write_json
from m1.planning import arithmetic
from m1.run import profiles as profile
from m1.run.contract import StageContext, StageRequest, StageResult, Upstream, load_result
from m1.run.folder import write_record
from m1.run.registry import stage
from m1.run.stage import Origin

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
    text = Path(json.__file__).read_text(encoding="utf-8")
    train.save(train.train([text], MODEL.vocab_size), root / "tokenizer")
    (root / "tokenizer" / "summary.json").write_text("{}")
    documents = [Document("code", text[:300]), Document("code", text)]
    write_indexed(documents, load_tokenizer(root / "tokenizer"), root / "tokens" / "heldout")
    parent = root / "runs" / "sft" / "0123"
    parent.mkdir(parents=True)
    parallel.initialize(ALONE, 1)
    model = build_model(MODEL, ALONE, seed=5, rotary_base=30_000.0)
    checkpoint.save(parent / "checkpoint", model, None, {"rotary_base": 30_000.0})
    values = profile.load("tiny").to_dict()
    request = StageRequest(
        stage="sft", profile=values, fingerprint="0123" * 16, output=str(parent), data={}, data_digests={}
    )
    result = StageResult(
        stage="sft", fingerprint="0123" * 16, request=request, checkpoint="checkpoint",
        key_metric="loss", before=3.0, after=2.0, metrics={},
    )  # fmt: skip
    write_record(parent / "result.json", result)
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
            parent=str(parent), parent_stage="sft", history=(Upstream(stage="sft", run=str(parent)),),
        )
    )  # fmt: skip


def execute(context: StageContext) -> StageResult:
    from stages.export.run import run

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
    from m1.formats import convert

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
        files.write(tmp_path / "model", hybrid.state_dict().__getitem__, 1e4, settings, inputs / "tokenizer")


def test_bfloat16_keeps_router_and_head_in_float32(exported, inputs, tmp_path):
    """What a bfloat16 profile stores is what was trained: bfloat16, router and head float32."""
    from safetensors.torch import load_file

    from m1.model.hybrid import build_model
    from stages.export import files

    settings = context(inputs, tmp_path, **{"parallel.precision": "bf16"}).profile
    trained = build_model(MODEL, settings.parallel.model_copy(update={"world_size": 1}), seed=5)
    source = trained.state_dict().__getitem__
    size = files.write(tmp_path / "model", source, trained.rotary_base, settings, inputs / "tokenizer")
    assert size == arithmetic.checkpoint_bytes(MODEL, precision="bf16", float32_head=True)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    wide = {name for name, weight in weights.items() if weight.dtype == torch.float32}
    assert wide == {
        name for name in weights if name == "lm_head.weight" or name.endswith("block_sparse_moe.gate.weight")
    }
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


# --- the released layout --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(inputs, tmp_path_factory):
    """Exported as MiniMax-M1 was, in files of at most 0.2 MB."""
    output = tmp_path_factory.mktemp("released")
    changes = {"export.layout": "minimax-m1", "export.shard_gigabytes": 0.0002}
    return output, execute(context(inputs, output, **changes))


def test_released_layout_agrees_with_its_definition(released):
    """The stage compares with plain torch that reads config.json and the files by the released names."""
    output, result = released
    assert result.key_metric == "max |logprob difference|" and 0 < result.after < 1e-4
    assert result.metrics["export/weights_read_back"] == 8 * (3 + 2 * MODEL.num_experts) + 7 * 4 + 2 + 3
    card = (output / "model" / "README.md").read_text()
    for needed in (
        "minimax-m1",
        "rotary_dim 8 of 16",
        "rope_theta 30000",
        "vLLM itself was not run",
        "0123012301230123",
    ):
        assert needed in card


def test_released_layout_in_several_files(released):
    folder = released[0] / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == released[1].metrics["export/bytes"]
    assert all((folder / file).stat().st_size < 0.25e6 for file in files)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MiniMaxM1ForCausalLM"] and config["attn_type_list"] == [0] * 7 + [1]
    assert (config["rotary_dim"], config["rope_theta"], config["eos_token_id"]) == (8, 30000, config["eos_token_id"])


def test_released_configuration_is_read_through_its_class(released):
    """As vLLM reads it: a type that transformers does not know, by the file beside it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(released[0] / "model", trust_remote_code=True)
    assert type(config).__name__ == "MiniMaxM1Config"
    assert (config.rotary_dim, config.attn_type_list[-1], config.num_local_experts) == (8, 1, MODEL.num_experts)


def test_the_definition_agrees_with_transformers_where_they_are_one(tmp_path):
    """With whole heads rotated both layouts are one: transformers' own weights in its code and in the definition."""
    from transformers import MiniMaxForCausalLM

    from m1.formats import convert
    from m1.formats import layouts as interchange
    from m1.formats.released import ReleasedModel

    model = MODEL.model_copy(update={"rotary_percent": 1.0, "softmax_every": 4})
    torch.manual_seed(2)
    other = MiniMaxForCausalLM(convert.transformers_config(model, 5e4)).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3).add_(0.2 * torch.randn_like(parameter) if parameter.dim() == 1 else 0)
    other.save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", interchange.minimax_m1_config(model, 5e4, "float32"))
    tokens = torch.randint(0, 400, (1, 530), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = other(tokens).logits
    plain = ReleasedModel(tmp_path)
    logits, _ = plain.logits(tokens)
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-4
    _, state = plain.logits(tokens[:, :500])
    for i in range(500, 530):
        step, state = plain.logits(tokens[:, i : i + 1], state)
        assert (step[:, 0] - expected[:, i]).abs().max() < 1e-4


@pytest.mark.parametrize(
    "damage",
    [
        # Rotary pairs as transformers expects them; q, k, v in thirds; gate and up exchanged.
        lambda name, w: w[torch.tensor([*range(4), *range(8, 12), *range(4, 8), *range(12, 16)]).repeat(4)
                          + torch.arange(4).repeat_interleave(16) * 16] if "q_proj" in name else w,
        lambda name, w: w.view(4, 3, 16, -1).transpose(0, 1).reshape_as(w) if "layers.0.self_attn.qkv" in name else w,
        lambda name, w: -w if "layers.3.block_sparse_moe.experts.1.w3" in name else w,
    ],
    ids=["rotary", "thirds", "experts"],
)  # fmt: skip
def test_the_definition_notices(released, inputs, tmp_path, damage):
    """Each mistake that the layout invites moves the logits far beyond the tolerance."""
    from safetensors.torch import load_file, save_file

    from m1.training.checkpoint import load_model
    from stages.export import check

    for file in (released[0] / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
        if file.suffix == ".safetensors":
            content = {name: damage(name, weight).contiguous() for name, weight in load_file(file).items()}
            save_file(content, tmp_path / file.name)
    trained = load_model(inputs / "runs/sft/0123/checkpoint", MODEL, ALONE)
    tokens = check.heldout_tokens(inputs / "tokens" / "heldout", 300)
    found = check.compare(tmp_path, "minimax-m1", trained, tokens)
    assert min(found.prefill, found.decode) > 1e-3


@pytest.mark.parametrize("layout", ["transformers", "minimax-m1"])
def test_logits_agree_up_to_2000_tokens(exported, released, inputs, layout):
    """Prefill of several lengths and decoding at the end of the longest, lightning and softmax layers alike."""
    from small_model import logits_of

    from m1.training.checkpoint import load_model
    from stages.export import check

    folder = (exported if layout == "transformers" else released)[0] / "model"
    trained = load_model(inputs / "runs/sft/0123/checkpoint", MODEL, ALONE)
    tokens = torch.randint(0, MODEL.vocab_size, (1, 2000), generator=torch.Generator().manual_seed(8))
    expected = logits_of(trained, tokens)
    reader = check.Released(folder) if layout == "minimax-m1" else check.Transformers(folder, torch.device("cpu"))
    with torch.no_grad():
        for length in (1, 257, 2000):
            assert (reader.read(tokens[:, :length])[0] - expected[:, :length]).abs().max() < 1e-4
        _, state = reader.read(tokens[:, :1970])
        for i in range(1970, 2000):
            logits, state = reader.step(tokens[:, i : i + 1], i, state)
            assert (logits[:, 0] - expected[:, i]).abs().max() < 1e-4


def test_weights_alone_are_checked_where_the_model_fits_no_machine(inputs, tmp_path, monkeypatch):
    """`export.check: weights`: the training model is never built, and the card says what was not compared."""
    from m1.training import checkpoint

    monkeypatch.delattr(checkpoint, "load_model")
    changes = {"export.check": "weights", "export.layout": "minimax-m1", "parallel.precision": "bf16",
               "export.head_precision": "bf16"}  # fmt: skip
    result = execute(context(inputs, tmp_path, **changes))
    assert (result.key_metric, result.after) == ("parameters that differ", 0.0)
    assert result.metrics["export/bytes"] == arithmetic.checkpoint_bytes(MODEL, precision="bf16")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Not compared: log-probabilities" in card and "rounded from the float32" in card


def test_a_weight_that_did_not_reach_the_disk_is_noticed(inputs, tmp_path, monkeypatch):
    from stages.export import files

    original = files.save_file

    def faulty(content, file, metadata):
        content = {
            name: weight + 1 if name.endswith("experts.2.w3.weight") else weight for name, weight in content.items()
        }
        original(content, file, metadata=metadata)

    monkeypatch.setattr(files, "save_file", faulty)
    with pytest.raises(StageFailed, match=r"layers\.0\.mlp.*experts\.2\.linear_fc1.weight read back"):
        execute(context(inputs, tmp_path, **{"export.check": "weights"}))
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".model*"))


def test_a_full_disk_leaves_nothing_that_looks_complete(inputs, tmp_path, monkeypatch):
    """The third file cannot be written: no index, no folder of the final name, and the error says why."""
    from stages.export import files

    original, written = files.save_file, []

    def full(content, file, metadata):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(file)
        original(content, file, metadata=metadata)

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(StageFailed, match="No space left"):
        execute(context(inputs, tmp_path, **{"export.shard_gigabytes": 0.0002, "export.check": "weights"}))
    assert load_result(tmp_path) is None and not (tmp_path / "model").exists()
    assert not list(tmp_path.rglob("*.index.json"))


# --- and back: a stage that starts from an exported model -----------------------------------------------------------


def pretraining(inputs: Path, output: Path, base: Path, **overrides) -> StageContext:
    """One step of pretraining from the weights in `base`, on the held-out text."""
    changes = {
        "pretrain.init_from": str(base), "pretrain.sequence_length": 64, "pretrain.global_batch_size": 4,
        "pretrain.micro_batch_size": 2, "pretrain.train_steps": 1, "pretrain.evaluate_every": 1,
        "parallel.world_size": 1, **overrides,
    }  # fmt: skip
    values = profile.load("tiny", overrides=changes).to_dict()
    values["model"] = MODEL.model_copy(update={"rotary_base": 30_000.0}).model_dump(mode="json")
    settings = profile.parse(values, "test")
    return StageContext(
        StageRequest(
            stage="pretrain", profile=values, fingerprint="cd" * 32, output=str(output),
            data={name: str(inputs / name) for name in ("tokenizer", "tokens")}, data_digests={},
            origin=stage("pretrain").origin(settings, inputs / "tokenizer"),
        )
    )  # fmt: skip


@pytest.fixture
def token_sets(inputs):
    """The held-out documents stand for the training text too."""
    for suffix in (".bin", ".idx"):
        target = (inputs / "tokens" / "train").with_suffix(suffix)
        target.write_bytes((inputs / "tokens" / "heldout").with_suffix(suffix).read_bytes())


@pytest.mark.parametrize("layout", ["transformers", "minimax-m1"])
def test_pretraining_starts_from_an_exported_model(exported, released, inputs, tmp_path, token_sets, layout):
    """The loss before the first step is, bit for bit, that of the model that was exported."""
    from m1.training import checkpoint, loop, parallel
    from m1.training.trainer import Trainer
    from stages.pretrain import train

    folder = (exported if layout == "transformers" else released)[0] / "model"
    started = pretraining(inputs, tmp_path / "run", folder)
    result = train.run(started)
    assert result.request.origin == started.request.origin
    assert str(folder) in result.notes[0] and started.request.origin.digest[:16] in result.notes[0]

    parallel.initialize(started.profile.parallel, 1)
    settings = started.profile
    trainer = Trainer(settings.model, settings.parallel, seed=77, optimizer=settings.pretrain.optimizer)
    trainer.load(inputs / "runs/sft/0123/checkpoint", optimizer=False)
    batches = train.held_out_batches(started, 64, 2, 0, 1)
    assert result.before == loop.held_out_loss(trainer, batches)["loss"]
    assert result.after != result.before
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is not None


def test_a_stage_that_goes_on_does_not_start_from_the_base_again(released, inputs, tmp_path, token_sets):
    """Its own checkpoint counts; the base model may be gone by then."""
    import shutil

    from stages.pretrain import train

    shutil.copytree(released[0] / "model", tmp_path / "base")
    started = pretraining(inputs, tmp_path / "run", tmp_path / "base")
    first = train.run(started)
    shutil.rmtree(tmp_path / "base")
    again = train.run(StageContext(started.request))
    assert (again.before, again.after, again.notes) == (first.before, first.after, ())


def test_a_base_model_that_changed_since_the_plan_is_refused(released, inputs, tmp_path, token_sets):
    from stages.pretrain import train

    started = pretraining(inputs, tmp_path / "run", released[0] / "model")
    assert started.request.origin is not None
    other = Origin(started.request.origin.folder, "0" * 64)
    started.request = started.request.model_copy(update={"origin": other})
    with pytest.raises(UsageError, match="has changed since"):
        train.run(started)


def test_a_base_model_with_another_tokenizer_or_shape_is_refused_before_anything(released, inputs, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    content = json.loads((inputs / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    *_, first, second = vocabulary  # not among the special tokens, which are listed apart
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="2 tokens other numbers"):
        pretraining(tmp_path, tmp_path / "run", released[0] / "model")
    with pytest.raises(UsageError, match=r"no config\.json there"):
        pretraining(inputs, tmp_path / "run", tmp_path)


def test_the_base_model_is_part_of_the_identity(released):
    from m1.run.identity import fingerprint

    settings = profile.load("tiny")
    one, other, moved = (
        fingerprint("pretrain", settings, {}, origin=Origin(place, digest * 64))
        for place, digest in (("/a", "a"), ("/a", "b"), ("/elsewhere", "a"))
    )
    assert one != other and one == moved
    assert fingerprint("pretrain", settings, {}) not in (one, other)


def test_module_runs_alone():
    """`python -m stages.export` is the entry point that the flow starts."""
    record = stage("export")
    assert record.package == "stages.export" and "tokens" in record.reads
    done = subprocess.run([sys.executable, "-m", record.package, "--help"], capture_output=True, text=True, check=True)
    assert record.about in " ".join(done.stdout.split())
