"""The hybrid on Megatron-core against transformers' independent implementation of the same family."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import SMALL, logits_of

from m1.errors import UsageError
from m1.formats import convert


def changed(**fields):
    return SMALL.model_copy(update=fields)


def converted(hybrid, model=SMALL):
    """The same function in transformers, float32."""
    from transformers import MiniMaxForCausalLM

    other = MiniMaxForCausalLM(convert.transformers_config(model, hybrid.rotary_base)).eval()
    outcome = other.load_state_dict(convert.to_transformers(hybrid.state_dict(), model), strict=False)
    assert not outcome.unexpected_keys
    assert all(name.endswith(convert.DECAY_TABLES) for name in outcome.missing_keys)
    return other


@pytest.fixture(scope="module")
def other(hybrid):
    return converted(hybrid)


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 600])
def test_logits_agree(hybrid, other, tokens, length):
    ours = logits_of(hybrid, tokens[:, :length])
    with torch.no_grad():
        theirs = other(tokens[:, :length]).logits
    assert ours.abs().max() > 0.5
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(
    "fields",
    [
        {"rotary_percent": 0.25},
        {"rotary_percent": 1.0},
        {"softmax_every": 1, "num_layers": 2},
        {"softmax_every": 4, "num_query_groups": 4},
        {"num_query_groups": 1, "num_experts": 3, "moe_router_topk": 3},
        {"num_layers": 3, "softmax_every": 2, "head_dim": 24, "num_attention_heads": 8},
    ],
    ids=str,
)
def test_logits_agree_for_other_shapes(hybrid, tokens, fields):
    from small_model import ALONE

    from m1.model.hybrid import build_model

    model = changed(**fields)
    built = build_model(model, ALONE, seed=2, rotary_base=777.0).eval()
    with torch.no_grad():
        theirs = converted(built, model)(tokens[:, :300]).logits
    assert (logits_of(built, tokens[:, :300]) - theirs).abs().max() < 1e-4


def test_cached_decoding_agrees(hybrid, other, tokens):
    """Positions are passed as `generate` passes them: left alone, transformers takes each new token to be the first."""
    expected = logits_of(hybrid, tokens[:, :300])
    with torch.no_grad():
        state = other(tokens[:, :280], use_cache=True)
        for i in range(280, 300):
            at = torch.full((2, 1), i)
            state = other(tokens[:, i : i + 1], position_ids=at, past_key_values=state.past_key_values, use_cache=True)
            assert (state.logits[:, 0] - expected[:, i]).abs().max() < 1e-4


def test_plain_rotary_settings_would_be_wrong(hybrid, other, tokens):
    """The trap itself: with the base as it is and no reordering transformers computes another function."""
    from transformers import MiniMaxForCausalLM

    config = convert.transformers_config(SMALL, hybrid.rotary_base)
    config.rope_parameters = {"rope_type": "default", "rope_theta": hybrid.rotary_base}
    naive = MiniMaxForCausalLM(config).eval()
    naive.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert (naive(tokens[:, :300]).logits - logits_of(hybrid, tokens[:, :300])).abs().max() > 1e-2


def test_every_rotary_angle_is_the_trained_one(hybrid):
    """Frequencies side by side: Megatron's for the rotated pairs, zero for the others."""
    from transformers.models.minimax.modeling_minimax import MiniMaxRotaryEmbedding

    theirs = MiniMaxRotaryEmbedding(convert.transformers_config(SMALL, hybrid.rotary_base)).inv_freq
    ours = hybrid.rotary_pos_emb.inv_freq
    assert len(ours) == SMALL.head_dim // 4
    torch.testing.assert_close(theirs[: len(ours)], ours, rtol=1e-6, atol=0)
    assert (theirs[len(ours) :] == 0).all()


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([(4, 1.0), (8, 0.5), (16, 0.25), (16, 0.75), (24, 0.5), (128, 0.5)]))
def test_rotary_order_pairs_what_training_pairs(shape):
    dim, percent = shape
    order = convert.rotary_order(changed(head_dim=dim, rotary_percent=percent)).tolist()
    assert sorted(order) == list(range(dim))
    rotated = int(dim * percent)
    for i in range(rotated // 2):
        assert (order[i], order[i + dim // 2]) == (i, i + rotated // 2)


def test_round_trip_is_exact(hybrid):
    state = {name: value for name, value in hybrid.state_dict().items() if not name.endswith("_extra_state")}
    back = convert.from_transformers(convert.to_transformers(state, SMALL), SMALL)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_round_trip_from_the_other_side_is_exact(other):
    """Starting from a full transformers state dict, decay tables included."""
    state = other.state_dict()
    back = convert.to_transformers(convert.from_transformers(state, SMALL), SMALL)
    weights = {name: value for name, value in state.items() if not name.endswith(convert.DECAY_TABLES)}
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_lightning_decays_agree_to_the_stated_tolerance(hybrid, other):
    """transformers divides the layer by (layers - 1 + 1e-5): the slopes differ by less than 1e-5 of the head's own."""
    for ours, theirs in zip(hybrid.decoder.layers, other.model.layers):
        if hasattr(ours.self_attention, "slopes"):
            slopes = theirs.self_attn.slope_rate.flatten()
            assert (ours.self_attention.slopes - slopes).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_attention_heads": 6, "num_query_groups": 2}, "num_attention_heads=6"),
        ({"lightning_norm_epsilon": 1e-5}, "lightning_norm_epsilon"),
        ({"head_dim": 5, "rotary_percent": 0.8}, "head_dim=5"),
        ({"head_dim": 16, "rotary_percent": 0.05}, "rotary_percent=0.05"),
    ],
)
def test_what_transformers_cannot_represent_is_refused(fields, named):
    with pytest.raises(UsageError, match=named):
        convert.transformers_config(changed(**fields), 1e4)


def test_wrong_weights_are_refused(hybrid):
    state = convert.to_transformers(hybrid.state_dict(), SMALL)
    with pytest.raises(ValueError, match=r"model\.layers\.8.*is missing|missing"):
        convert.from_transformers(state, changed(num_layers=9))
    with pytest.raises(ValueError, match="does not have"):
        convert.from_transformers(state | {"extra.weight": torch.zeros(1)}, SMALL)
    with pytest.raises(ValueError, match="shape"):
        convert.to_transformers(hybrid.state_dict(), changed(head_dim=8))
