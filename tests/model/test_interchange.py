"""What a base model's folder is checked for before any weight is read: every difference, in one error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_model import SMALL

from m1.config.model import Model
from m1.errors import UsageError
from m1.formats import folder as folders
from m1.formats import layouts
from m1.formats.layouts import MINIMAX_M1, TRANSFORMERS
from m1.run import profiles as profile

#: The released config.json of MiniMax-M1: its values, without the keys that say nothing about the function.
RELEASED = {
    "architectures": ["MiniMaxM1ForCausalLM"], "model_type": "minimax_m1", "attn_type_list": ([0] * 7 + [1]) * 10,
    "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": None, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 6144, "initializer_range": 0.02, "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.5565588200778455, "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455, "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455, "layernorm_mlp_beta": 1.0, "max_position_embeddings": 10240000,
    "num_attention_heads": 64, "num_experts_per_tok": 2, "num_hidden_layers": 80, "num_key_value_heads": 8,
    "num_local_experts": 32, "output_router_logits": False, "postnorm": True, "rms_norm_eps": 1e-05,
    "rope_theta": 10000000, "rotary_dim": 64, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "sliding_window": None, "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 200064,
}  # fmt: skip


def changed(**fields) -> Model:
    return SMALL.model_copy(update=fields)


def transformers_values(model: Model) -> dict:
    """config.json as transformers itself writes it."""
    from m1.formats import convert

    return json.loads(convert.transformers_config(model, model.rotary_base).to_json_string())


def put(folder: Path, config: dict, tensors: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors or {"model.norm.weight": torch.ones(4)}, folder / folders.SINGLE)
    return folder


def test_the_released_configuration_is_the_profile_of_that_size_but_for_its_rope_base():
    """m1-456b starts from the base of pretraining; the released checkpoint is at the end of its extension."""
    model = profile.load("m1-456b").model
    faults, notes = folders.compare(RELEASED, MINIMAX_M1, model)
    assert faults == ["model.rotary_base is 10000.0, config.json has rope_theta=10000000"]
    assert notes == []
    assert folders.compare(RELEASED, MINIMAX_M1, model.model_copy(update={"rotary_base": 1e7})) == ([], [])


def test_the_configuration_written_for_that_size_is_the_released_one():
    written = layouts.minimax_m1_config(profile.load("m1-456b").model, 1e7, "bfloat16")
    silent = {"bos_token_id", "eos_token_id"}  # the tokenizer's, given by the export stage
    assert {key: written[key] for key in RELEASED if key not in silent} == {
        key: value for key, value in RELEASED.items() if key not in silent
    }


@pytest.mark.parametrize("layout", [TRANSFORMERS, MINIMAX_M1])
@pytest.mark.parametrize("base", [10_000.0, 50_000.0, 123_457.0, 5e6, 1e7])
def test_the_own_configuration_fits_at_every_base(layout, base):
    model = changed(rotary_base=base)
    written = (
        transformers_values(model) if layout == TRANSFORMERS else layouts.minimax_m1_config(model, base, "float32")
    )
    assert folders.compare(written, layout, model) == ([], [])
    other, _ = folders.compare(written, layout, changed(rotary_base=base + 1))
    assert len(other) == 1 and "rope_theta" in other[0]


def test_every_difference_is_in_one_error(tmp_path):
    config = layouts.minimax_m1_config(SMALL, 1e4, "float32")
    config |= {"hidden_size": 64, "rotary_dim": 16, "postnorm": False, "layernorm_mlp_beta": 0.5}
    del config["num_local_experts"]
    with pytest.raises(UsageError) as caught:
        folders.inspect(put(tmp_path / "base", config), SMALL)
    message = str(caught.value)
    for part in (
        str(tmp_path / "base"),
        "model.hidden_size is 48, config.json has hidden_size=64",
        "model.num_experts is 4, config.json has no num_local_experts",
        "rotates 8 channels of a head, config.json has rotary_dim=16",
        "postnorm=False",
        "layernorm_mlp_beta=0.5",
    ):
        assert part in message
    assert message.count(";") == 4


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (MINIMAX_M1, {"shared_intermediate_size": [0, 128]}, "shared_intermediate_size"),
        (MINIMAX_M1, {"attn_type_list": [1] + [0] * 7}, "attn_type_list in 0 of 8"),
        (MINIMAX_M1, {"attn_type_list": [2] * 8}, "not a list of 0 and 1"),
        (MINIMAX_M1, {"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        (MINIMAX_M1, {"quantization_config": {"bits": 8}}, "quantised"),
        (
            MINIMAX_M1,
            {"layernorm_full_attention_alpha": 1},
            r"alpha 2\.0, config.json has layernorm_full_attention_alpha=1",
        ),
        (TRANSFORMERS, {"layer_types": ["full_attention"] * 8}, "layer_types in 0, 1, 2, 3, 4, 5, ... of 8"),
        (TRANSFORMERS, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e8}}, "a scaling that"),
        (TRANSFORMERS, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rotates 1 of a head"),
        (TRANSFORMERS, {"rope_parameters": {"rope_theta": 1e4}, "rotary_dim": 8}, "does not read it and rotates whole"),
        (TRANSFORMERS, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "which transformers' "),
        (TRANSFORMERS, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (TRANSFORMERS, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (TRANSFORMERS, {"sliding_window": 512}, "sliding_window"),
    ],
)
def test_what_the_model_here_cannot_compute_is_refused(layout, change, message, tmp_path):
    own = transformers_values(SMALL) if layout == TRANSFORMERS else layouts.minimax_m1_config(SMALL, 1e4, "float32")
    assert folders.compare(own, layout, SMALL) == ([], [])
    with pytest.raises(UsageError, match=message):
        folders.inspect(put(tmp_path / "base", own | change), SMALL)


def test_a_whole_rotated_head_is_the_default_of_transformers():
    whole = changed(rotary_percent=1.0)
    values = transformers_values(whole)
    assert folders.compare(values, TRANSFORMERS, whole) == ([], [])
    old = {**values, "rope_parameters": None, "rope_theta": 1e4}  # as transformers 4 wrote it
    assert folders.compare(old, TRANSFORMERS, whole) == ([], [])


def test_longest_length_may_differ_and_is_noted(tmp_path):
    config = layouts.minimax_m1_config(SMALL, 1e4, "float32", max_position_embeddings=8192)
    found = folders.inspect(put(tmp_path / "base", config), SMALL)
    assert len(found.notes) == 1 and "8192 became the profile's 1024" in found.notes[0]


@pytest.mark.parametrize(
    ("fields", "layout", "named"),
    [
        ({"num_attention_heads": 6, "num_query_groups": 2}, TRANSFORMERS, "num_attention_heads=6"),
        ({"lightning_norm_epsilon": 1e-5}, MINIMAX_M1, "lightning_norm_epsilon"),
        ({"rotary_percent": 0.05}, MINIMAX_M1, "rotates nothing"),
        ({"num_layers": 1, "softmax_every": 1}, MINIMAX_M1, "num_layers=1"),
    ],
)
def test_what_a_layout_cannot_represent_is_refused_on_both_ways(fields, layout, named):
    model = changed(**fields)
    with pytest.raises(UsageError, match=named):
        layouts.require_representable(model, layout, 1e4)
    faults, _ = folders.compare(RELEASED, layout, model)
    assert any(named in fault for fault in faults)


def test_more_heads_than_a_power_of_two_fit_the_released_layout():
    """Its code has ALiBi's series for any number of heads, as training has; transformers' has another."""
    assert layouts.unrepresentable(changed(num_attention_heads=6), MINIMAX_M1) == []


def test_a_rope_base_that_vllm_would_cut_is_refused():
    with pytest.raises(UsageError, match=r"12345\.5 is not a whole number"):
        layouts.minimax_m1_config(SMALL, 12_345.5, "float32")


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({"model_type": "MiniMaxM1"}, MINIMAX_M1),
        ({"model_type": "minimax_text_01", "architectures": ["MiniMaxText01ForCausalLM"]}, MINIMAX_M1),
        ({"model_type": "minimax"}, TRANSFORMERS),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, None),
        ({"model_type": "minimax", "architectures": ["MiniMaxM1ForCausalLM"]}, None),
        ({}, None),
    ],
)
def test_the_layout_is_told_from_the_configuration(tmp_path, config, layout):
    folder = put(tmp_path / "base", config)
    if layout is None:
        with pytest.raises(UsageError, match="is no layout known here"):
            folders.open_folder(folder)
    else:
        assert folders.open_folder(folder).layout == layout


#: Of a tensor in the header of a safetensors file.
ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
#: What a folder can say of its vocabulary, and the fault; `...` is our own file.
SETTINGS = "tokenizer_config.json"
ADDED = {SETTINGS: {"added_tokens_decoder": {"3": {"content": "<end>"}}}}
LETTERS = {"a": 0, "b": 1, "ab": 2}
OTHER = {"a": 1, "b": 0, "ab": 2}
FILES = {
    "the same": ({"tokenizer.json": ...}, ""),
    "the same, older": ({"vocab.json": LETTERS, "merges.txt": "#version: 0.2\na b\n", **ADDED}, ""),
    "the same, oldest": ({"vocab.json": LETTERS, "added_tokens.json": {"<end>": 3}}, ""),
    "both": ({"tokenizer.json": ..., "vocab.json": OTHER, **ADDED}, "its vocab.json gives 2 tokens"),
    "other numbers": ({"vocab.json": OTHER, **ADDED}, "2 tokens other numbers"),
    "without the added": ({"vocab.json": LETTERS}, "1 tokens other numbers"),
    "other merges": ({"vocab.json": LETTERS, "merges.txt": "b a\n", **ADDED}, "other merges"),
    "a list of pieces": ({"tokenizer.json": {"model": {"vocab": [["a", -1.0], ["x", -2.0]]}}}, "other numbers"),
    "lines": ({"vocab.txt": "a\nb\nab\nx\n", **ADDED}, "other numbers"),
    "SentencePiece": ({"tokenizer.model": "x"}, "SentencePiece"),
    "SentencePiece beside": ({"tokenizer.model": "x", "tokenizer.json": ...}, ""),
    "none": ({}, "cannot be told"),
    "its settings alone": (ADDED, "cannot be told"),
    "damaged": ({"tokenizer.json": {"model": {"vocab": 7}}}, "is no vocabulary"),
    "damaged numbers": ({"vocab.json": {"a": "0"}}, "has the number '0'"),
    "damaged added": ({"tokenizer.json": {"added_tokens": [7]}}, "is no vocabulary"),
    "damaged settings": ({"vocab.json": {"a": 0}, SETTINGS: {"added_tokens_decoder": [7]}}, "is damaged"),
    "endless": ({"tokenizer.json": "[" * 100_000}, "nested more than"),
}


class TestFiles:
    """The folder itself: complete, safetensors, nothing outside of it."""

    @pytest.fixture
    def base(self, tmp_path):
        return put(tmp_path / "base", layouts.minimax_m1_config(SMALL, 1e4, "float32"))

    def test_pickled_weights_are_refused_with_the_way_out(self, base):
        (base / folders.SINGLE).unlink()
        (base / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(UsageError, match=r"pickled \(pytorch_model.bin\).*save_pretrained"):
            folders.inspect(base, SMALL)

    def test_no_folder_and_no_weights(self, base, tmp_path):
        with pytest.raises(UsageError, match=r"no config.json there"):
            folders.inspect(tmp_path / "nowhere", SMALL)
        (base / folders.SINGLE).unlink()
        with pytest.raises(UsageError, match=r"not there: model\.safetensors"):
            folders.inspect(base, SMALL)

    def test_a_shard_that_is_missing_or_cut_short(self, base):
        (base / folders.SINGLE).rename(base / "model-00001-of-00002.safetensors")
        names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (base / folders.INDEX).write_text(json.dumps({"weight_map": names}))
        with pytest.raises(UsageError, match="not there: model-00002"):
            folders.inspect(base, SMALL)
        content = (base / names["a"]).read_bytes()
        for cut in (content[:-1], content[:4], b"", content + b"x", b"\xff" * 16):
            (base / names["b"]).write_bytes(cut)
            with pytest.raises(UsageError, match=r"model-00002-of-00002\.safetensors is damaged or cut short"):
                folders.inspect(base, SMALL)

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "weights.bin"])
    def test_an_index_leads_nowhere_else(self, base, name):
        (base / folders.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UsageError, match="names"):
            folders.inspect(base, SMALL)

    def test_types_that_are_no_weights(self, base):
        save_file({"model.norm.weight": torch.ones(4, dtype=torch.int8)}, base / folders.SINGLE)
        with pytest.raises(UsageError, match=r"model\.norm\.weight has dtype I8"):
            folders.inspect(base, SMALL)

    def test_the_digest_follows_configuration_and_headers(self, base):
        first = folders.inspect(base, SMALL).digest
        assert folders.inspect(base, SMALL).digest == first
        save_file({"model.norm.weight": torch.ones(5)}, base / folders.SINGLE)
        second = folders.inspect(base, SMALL).digest
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"note": 1}))
        assert len({first, second, folders.inspect(base, SMALL).digest}) == 3

    @pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}, [], 7])
    def test_an_empty_index_is_named(self, base, content):
        (base / folders.INDEX).write_text(json.dumps(content))
        with pytest.raises(UsageError, match=r"index\.json"):
            folders.inspect(base, SMALL)

    def test_tensors_are_where_the_index_says(self, base):
        (base / folders.SINGLE).unlink()
        shards = ["one.safetensors", "two.safetensors"]
        save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, base / shards[0])
        save_file({"a": torch.ones(4), "c": torch.ones(4)}, base / shards[1])
        for placed, fault in [
            ({"a": shards[1], "b": shards[0], "c": shards[1]}, ""),
            ({"a": shards[0], "b": shards[0], "c": shards[1]}, ""),
            ({"a": shards[0], "b": shards[1], "c": shards[1]}, r"b is not in two\.safetensors, where"),
            ({"a": shards[0], "b": shards[0], "c": shards[1], "d": shards[1]}, r"d is not in two\.safetensors"),
            ({"a": shards[0], "c": shards[1]}, r"b in one\.safetensors is not in model\.safetensors\.index\.json"),
        ]:
            (base / folders.INDEX).write_text(json.dumps({"weight_map": placed}))
            if fault:
                with pytest.raises(UsageError, match=fault):
                    folders.inspect(base, SMALL)
            else:
                found = folders.inspect(base, SMALL).tensors
                assert {name: stored.file.name for name, stored in found.items()} == placed

    def test_weights_beside_an_index_of_others_are_refused(self, base):
        save_file({"a": torch.zeros(4)}, base / "one.safetensors")
        (base / folders.INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
        with pytest.raises(UsageError, match=r"programs differ.*Remove the one"):
            folders.inspect(base, SMALL)

    def test_a_file_without_tensors_is_named(self, base):
        save_file({}, base / folders.SINGLE)
        with pytest.raises(UsageError, match=r"model\.safetensors holds no tensor"):
            folders.inspect(base, SMALL)

    @pytest.mark.parametrize(
        "entries",
        [
            f'{{"a": {ENTRY}, "a": {ENTRY}}}',
            '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [2, 4]}}',
            f'{{"a": {ENTRY}, "b": {ENTRY}}}',
            '{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
            '{"a": 7}',
            "[]",
            "[" * 100_000,
            "\xff",
        ],
    )
    def test_a_header_that_does_not_hold_is_damage(self, base, entries):
        header = entries.encode()
        (base / folders.SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
        with pytest.raises(UsageError, match=r"model\.safetensors is damaged or cut short"):
            folders.inspect(base, SMALL)

    @pytest.mark.parametrize("content", ["[" * 100_000, "7", "{", '{"a": 1, "a": 2}', "\ud800"])
    def test_a_damaged_configuration_is_named(self, base, content):
        (base / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(UsageError, match=r"config\.json") as caught:
            folders.inspect(base, SMALL)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600

    def test_another_tokenizer_is_refused(self, base, tmp_path):
        own = tmp_path / "tokenizer"
        own.mkdir()
        tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<end>", "id": 2}]}
        (own / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(UsageError, match=r"it has no tokenizer\.json, vocab\.json, vocab\.txt: whether"):
            folders.inspect(base, SMALL, own)
        folders.inspect(base, SMALL, tmp_path / "not-made-yet")
        (base / "tokenizer.json").write_text(json.dumps(tokenizer))
        folders.inspect(base, SMALL, own)
        tokenizer["model"]["vocab"] = {"a": 1, "b": 0}
        (base / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(UsageError, match="2 tokens other numbers"):
            folders.inspect(base, SMALL, own)

    @pytest.fixture
    def own(self, tmp_path):
        """Our tokenizer: three letters, one merge, one added token."""
        own = tmp_path / "tokenizer"
        own.mkdir()
        model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
        tokenizer = {"model": model, "added_tokens": [{"content": "<end>", "id": 3}]}
        (own / "tokenizer.json").write_text(json.dumps(tokenizer))
        return own

    @pytest.mark.parametrize("kind", FILES)
    def test_the_vocabulary_is_compared_whatever_files_it_is_in(self, base, own, kind):
        files, fault = FILES[kind]
        for name, content in files.items():
            text = (own / "tokenizer.json").read_text() if content is ... else content
            (base / name).write_text(text if isinstance(text, str) else json.dumps(text))
        if fault:
            with pytest.raises(UsageError, match=fault):
                folders.inspect(base, SMALL, own)
        else:
            folders.inspect(base, SMALL, own)

    def test_other_merges_of_the_same_tokens(self, base, own):
        content = json.loads((own / "tokenizer.json").read_text())
        content["model"]["merges"] = ["a b"]  # as older versions write them
        (base / "tokenizer.json").write_text(json.dumps(content))
        folders.inspect(base, SMALL, own)
        content["model"]["merges"] = []
        (base / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UsageError, match="other merges"):
            folders.inspect(base, SMALL, own)
