"""Exported tensors one at a time: names and bytes without weights; there and back, bit for bit; parts for ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import ALONE, SMALL, logits_of

from m1.errors import UsageError
from m1.formats import folder as interchange
from m1.formats.layouts import MINIMAX_M1, TRANSFORMERS
from m1.planning import arithmetic
from m1.run import profiles as profile

LAYOUTS = (TRANSFORMERS, MINIMAX_M1)
WORKER = Path(__file__).with_name("import_worker.py")


def weights_of(hybrid):
    return {name: parameter.detach() for name, parameter in hybrid.named_parameters()}


def write(folder: Path, source, model, form, shard_bytes=150_000) -> Path:
    """A folder with weights and configuration, as the export stage writes them."""
    from stages.export import files

    folder.mkdir()
    files.write_config(folder, model, form, model.rotary_base, {})
    files.write_weights(folder, source, model, form, shard_bytes)
    return folder


@pytest.fixture(scope="module")
def model():
    """The base of `hybrid`, which is not the default, is the profile's too."""
    return SMALL.model_copy(update={"rotary_base": 50_000.0})


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request, hybrid, model, tmp_path_factory):
    from m1.formats.mapping import Form

    form = Form(request.param, "fp32")
    return write(tmp_path_factory.mktemp("stored") / request.param, weights_of(hybrid).__getitem__, model, form)


def test_the_published_checkpoint_by_its_names_and_bytes():
    """8,243 tensors and 912,210,767,872 bytes: the index of the released MiniMax-M1 (recipe in docs/model.md)."""
    from m1.formats.mapping import Form, exported, exported_bytes

    settings = profile.load("m1-456b")
    form = Form.of(settings)
    tensors = exported(settings.model, form)
    assert form == Form(MINIMAX_M1, "bf16", "bf16")
    assert len(tensors) == 8243
    assert exported_bytes(settings.model, form) == 912_210_767_872
    assert sum(tensor.numel() for tensor in tensors.values()) == arithmetic.parameters(settings.model).total
    assert {name for name, t in tensors.items() if t.dtype == torch.float32} == {
        f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(80)
    }
    assert tensors["model.layers.79.block_sparse_moe.experts.31.w2.weight"].shape == (6144, 9216)
    assert tensors["model.layers.0.self_attn.qkv_proj.weight"].shape == (24576, 6144)
    assert tensors["model.layers.7.self_attn.k_proj.weight"].shape == (1024, 6144)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_those_of_the_closed_form(layout):
    from m1.formats.mapping import Form, exported_bytes

    for precision, head in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
        expected = arithmetic.checkpoint_bytes(SMALL, precision=precision, float32_head=head == "fp32")
        assert exported_bytes(SMALL, Form(layout, precision, head)) == expected


def test_shapes_are_those_of_the_built_model(hybrid, model):
    from m1.formats.mapping import trained_shapes

    assert dict(trained_shapes(model)) == {name: tuple(weight.shape) for name, weight in weights_of(hybrid).items()}


def test_there_and_back_is_exact_to_the_bit(folder, hybrid, model):
    from m1.formats.mapping import FolderReader, trained

    base = interchange.inspect(folder, model)
    assert len(list(folder.glob("model-*.safetensors"))) > 5
    with FolderReader(base, model) as read:
        for name, expected in weights_of(hybrid).items():
            assert torch.equal(trained(read, name, model, base.layout), expected), name


def test_a_loaded_model_computes_the_same(folder, hybrid, model, tokens):
    from m1.formats import weights as base
    from m1.model.hybrid import build_model

    other = build_model(model, ALONE, seed=1).eval()
    assert not torch.equal(logits_of(other, tokens[:, :64]), logits_of(hybrid, tokens[:, :64]))
    notes = base.load(interchange.inspect(folder, model), other)
    assert torch.equal(logits_of(other, tokens[:, :64]), logits_of(hybrid, tokens[:, :64]))
    assert len(notes) == 1 and str(folder) in notes[0]


def test_the_layouts_differ_in_rotary_channels_alone(hybrid, model):
    from m1.formats.mapping import stored

    released, port = (
        dict(stored(weights_of(hybrid).__getitem__, model, layout)) for layout in (MINIMAX_M1, TRANSFORMERS)
    )
    assert released.keys() == port.keys()
    assert {name for name in port if not torch.equal(port[name], released[name])} == {
        "model.layers.7.self_attn.q_proj.weight", "model.layers.7.self_attn.k_proj.weight"
    }  # fmt: skip


def test_parts_of_all_ranks_make_the_whole_and_nothing_is_read_twice(folder, hybrid, model):
    """Two tensor-parallel ranks: every element of a split weight is read by one of them, of another by both."""
    from m1.formats.mapping import FolderReader, trained

    base = interchange.inspect(folder, model)
    with FolderReader(base, model) as read:
        for name, parameter in hybrid.named_parameters():
            asked: list[int] = []

            def counting(target, rows, columns, asked=asked):
                part = read(target, rows, columns)
                asked.append(part.numel())
                return part

            parts = [trained(counting, name, model, base.layout, rank, 2) for rank in range(2)]
            split = getattr(parameter, "tensor_model_parallel", False)
            assert sum(asked) == parameter.numel() * (1 if split else 2), name
            if "linear_fc1" in name:
                assert torch.equal(torch.cat([torch.cat(h) for h in zip(*(p.chunk(2) for p in parts))]), parameter)
            elif split:
                assert torch.equal(torch.cat(parts, dim=parameter.partition_dim), parameter), name
            else:
                assert all(torch.equal(part, parameter) for part in parts)


def test_every_parallel_layout_reads_its_own_part(folder, hybrid, tmp_path):
    """Two ranks over gloo: tensor, expert-tensor, expert and pipeline parallel; put together they are the model.

    The checkpoints they then write are read parameter by parameter, whatever the layout, as the export does.
    """
    from m1.formats.megatron import CheckpointTensors

    layouts = ["tensor_model_parallel_size=2,expert_tensor_parallel_size=2", "expert_model_parallel_size=2",
               "pipeline_model_parallel_size=2"]  # fmt: skip
    save_file({name: weight.clone() for name, weight in weights_of(hybrid).items()}, tmp_path / "whole.safetensors")
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{WORKER.parents[2]}{os.pathsep}{WORKER.parent}"
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    done = subprocess.run(
        [*command, str(folder), str(tmp_path / "whole.safetensors"), *layouts],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = sorted(line for line in done.stdout.splitlines() if line.startswith("equal "))
    assert told == sorted(f"equal {layout} rank {rank}" for layout in layouts for rank in range(2))
    for layout in layouts:
        source = CheckpointTensors(tmp_path / layout)
        assert source.rotary_base == 50_000.0
        for name, expected in weights_of(hybrid).items():
            assert torch.equal(source(name), expected), f"{layout}: {name}"


def test_names_that_transformers_uses_in_memory_are_read_too(hybrid, model, tmp_path):
    """A folder saved with experts stacked, as `save_pretrained(..., save_original_format=False)` leaves it."""
    from transformers import MiniMaxForCausalLM

    from m1.formats import convert
    from m1.formats.mapping import FolderReader, trained

    port = MiniMaxForCausalLM(convert.transformers_config(model, model.rotary_base))
    port.load_state_dict(convert.to_transformers(hybrid.state_dict(), model), strict=False)
    port.save_pretrained(tmp_path / "port", save_original_format=False, max_shard_size="200KB")
    base = interchange.inspect(tmp_path / "port", model)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in base.tensors)
    with FolderReader(base, model) as read:
        for name, expected in weights_of(hybrid).items():
            assert torch.equal(trained(read, name, model, base.layout), expected), name
            if "linear_fc1" in name:
                halves = [trained(read, name, model, base.layout, rank, 2).chunk(2) for rank in range(2)]
                assert torch.equal(torch.cat([torch.cat(h) for h in zip(*halves)]), expected)


def test_what_transformers_saves_itself_is_read(hybrid, model, tmp_path):
    """From transformers: random weights of its own, saved by it, read here; logits agree."""
    from transformers import MiniMaxForCausalLM

    from m1.formats import convert
    from m1.formats import weights as base
    from m1.model.hybrid import build_model

    torch.manual_seed(11)
    port = MiniMaxForCausalLM(convert.transformers_config(model, model.rotary_base)).eval()
    with torch.no_grad():
        for parameter in port.parameters():
            parameter.mul_(3).add_(0.1 if parameter.dim() == 1 else 0)
    port.save_pretrained(tmp_path / "port")
    other = build_model(model, ALONE, seed=1).eval()
    base.load(interchange.inspect(tmp_path / "port", model), other)
    tokens = torch.randint(0, model.vocab_size, (1, 500), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = port(tokens).logits
    assert theirs.std() > 0.1
    assert (logits_of(other, tokens) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (
            lambda t: t.update({"model.layers.0.shared_mlp.gate_proj.weight": torch.zeros(2)}),
            "is not part of the model",
        ),
        (lambda t: t.update({"lm_head.weight": torch.zeros(3, 48)}), r"lm_head.weight has shape \[3, 48\]"),
        (lambda t: t["model.norm.weight"].fill_(torch.nan), "final_layernorm.weight has values that are not finite"),
    ],
    ids=["missing", "unknown", "shape", "not finite"],
)
def test_weights_of_another_model_are_refused(hybrid, model, tmp_path, change, message):
    from m1.formats import weights as base
    from m1.formats.mapping import Form
    from m1.model.hybrid import build_model

    folder = write(tmp_path / "base", weights_of(hybrid).__getitem__, model, Form(MINIMAX_M1, "fp32"), 10**9)
    content = load_file(folder / interchange.SINGLE)
    change(content)
    save_file(content, folder / interchange.SINGLE)
    with pytest.raises(UsageError, match=message):
        base.load(interchange.inspect(folder, model), build_model(model, ALONE, seed=1))


def test_weights_that_are_not_finite_are_not_written(hybrid, model, tmp_path):
    from m1.errors import StageFailed
    from m1.formats.mapping import Form

    weights = {name: weight.clone() for name, weight in weights_of(hybrid).items()}
    weights["decoder.final_layernorm.weight"][3] = torch.inf
    with pytest.raises(StageFailed, match=r"model\.norm\.weight has values that are not finite"):
        write(tmp_path / "base", weights.__getitem__, model, Form(MINIMAX_M1, "fp32"))
    assert not list((tmp_path / "base").glob("*.index.json"))


def test_bfloat16_weights_come_back_as_bfloat16(hybrid, model, tmp_path):
    """Rounding happens once: bfloat16 stored is bfloat16 read, and the head keeps its own type."""
    from m1.formats.mapping import FolderReader, Form, trained

    for head in ("fp32", "bf16"):
        form = Form(MINIMAX_M1, "bf16", head)
        folder = write(tmp_path / head, weights_of(hybrid).__getitem__, model, form)
        with FolderReader(interchange.inspect(folder, model), model) as read:
            for name, weight in weights_of(hybrid).items():
                found = trained(read, name, model, MINIMAX_M1)
                assert found.dtype == form.dtype(name)
                assert torch.equal(found, weight.to(form.dtype(name)))
