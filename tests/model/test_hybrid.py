"""The hybrid itself: causality, pattern, constants, half rotary, initialisation."""

import pytest
import torch
from small_model import ALONE, SMALL, logits_of

from m1.model.attention import LightningAttention


def test_pattern_is_seven_lightning_then_one_softmax(hybrid):
    from m1.model.hybrid import build_model

    model = SMALL.model_copy(update={"num_layers": 16, "moe_ffn_hidden_size": 8})
    kinds = [
        isinstance(layer.self_attention, LightningAttention)
        for layer in build_model(model, ALONE, seed=1).decoder.layers
    ]
    assert kinds == [True] * 7 + [False] + [True] * 7 + [False]


def test_deepnorm_constants_of_the_published_model():
    """config.json of the released MiniMax-M1: every layernorm alpha, for 80 layers; beta scales the weights alone."""
    model = SMALL.model_copy(update={"num_layers": 80})
    assert model.deepnorm_alpha == 3.5565588200778455
    assert model.deepnorm_beta == pytest.approx(0.1988, abs=5e-5)


def test_layer_follows_its_formula(hybrid):
    """y = norm(x); h = alpha y + attention(y); z = norm(h); out = alpha z + MoE(z)."""
    layer = hybrid.decoder.layers[0]
    x = torch.randn(12, 2, SMALL.hidden_size)
    alpha = (2 * SMALL.num_layers) ** 0.25
    with torch.no_grad():
        out, _ = layer(x)
        y = torch.nn.functional.rms_norm(x, (SMALL.hidden_size,), None, SMALL.norm_epsilon)
        h = alpha * y + layer.self_attention(y)[0]
        z = torch.nn.functional.rms_norm(h, (SMALL.hidden_size,), None, SMALL.norm_epsilon)
        expected = alpha * z + layer.mlp(z)[0]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("position", [0, 100, 255, 256, 298])
def test_a_token_changes_nothing_before_it(hybrid, tokens, position):
    before = logits_of(hybrid, tokens[:, :300])
    edited = tokens[:, :300].clone()
    edited[:, position] = (edited[:, position] + 1) % SMALL.vocab_size
    after = logits_of(hybrid, edited)
    torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-5)
    assert (after[:, position:] - before[:, position:]).abs().max() > 1e-2


def test_rows_of_a_batch_do_not_meet(hybrid, tokens):
    alone = logits_of(hybrid, tokens[:1, :100])
    together = logits_of(hybrid, tokens[:, :100])
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


def test_half_of_each_softmax_head_is_rotated(hybrid):
    """Angles exist for half the channels, at base^(-2i/r)."""
    angles = hybrid.rotary_pos_emb(10).squeeze()
    half = SMALL.head_dim // 2
    assert angles.shape == (10, half)
    exponents = torch.arange(0, half, 2, dtype=torch.float64) / half
    expected = 9 * 50_000.0**-exponents
    torch.testing.assert_close(angles[9].double(), torch.cat((expected, expected)), rtol=1e-6, atol=0)


def test_rotary_base_reaches_the_logits_through_softmax_layers_only(hybrid, tokens):
    from m1.model.hybrid import build_model

    lightning = SMALL.model_copy(update={"num_layers": 7})
    for model, differs in ((SMALL, True), (lightning, False)):
        built = build_model(model, ALONE, seed=7, rotary_base=10_000.0).eval()
        before = logits_of(built, tokens[:, :64])
        built.set_rotary_base(1e7)
        assert (logits_of(built, tokens[:, :64]) != before).any() == differs


def test_head_and_router_are_float32_in_a_bfloat16_model(hybrid, tokens):
    from m1.model.hybrid import build_model

    half = build_model(SMALL, ALONE.model_copy(update={"precision": "bf16"}), seed=7).eval()
    kinds = {name: parameter.dtype for name, parameter in half.named_parameters()}
    wide = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert "output_layer.weight" in wide
    assert kinds["decoder.layers.0.self_attention.qkv_proj.weight"] == torch.bfloat16
    assert wide <= {"output_layer.weight"} | {name for name in kinds if ".router." in name}
    assert logits_of(half, tokens[:, :32]).dtype == torch.float32
    assert all(layer.self_attention.slopes.dtype == torch.float32 for layer in half.decoder.layers[:7])


def test_initialisation_has_the_deepnorm_scales(hybrid):
    """Xavier-normal, times beta = (8N)^(-1/4) on values, outputs and experts; norms at one."""
    beta = SMALL.deepnorm_beta
    layer = hybrid.decoder.layers[0]

    def relative(weight, shape):
        return float(weight.detach().std()) / (2 / sum(shape)) ** 0.5

    attention = layer.self_attention
    qkv = attention.qkv_proj.weight
    q, k, v = qkv.view(SMALL.num_attention_heads, 3, SMALL.head_dim, -1).unbind(1)
    assert relative(q, qkv.shape) == pytest.approx(1, abs=0.06)
    assert relative(k, qkv.shape) == pytest.approx(1, abs=0.06)
    assert relative(v, qkv.shape) == pytest.approx(beta, rel=0.06)
    assert relative(attention.output_gate.weight, attention.output_gate.weight.shape) == pytest.approx(1, abs=0.06)
    assert relative(attention.out_proj.weight, attention.out_proj.weight.shape) == pytest.approx(beta, rel=0.06)
    fc1 = layer.mlp.experts.local_experts[0].linear_fc1.weight
    assert relative(fc1, fc1.shape) == pytest.approx(beta, rel=0.06)
    fused = hybrid.decoder.layers[7].self_attention.linear_qkv.weight
    groups = fused.view(SMALL.num_query_groups, -1, SMALL.head_dim, SMALL.hidden_size)
    assert relative(groups[:, :-1], fused.shape) == pytest.approx(1, abs=0.06)
    assert relative(groups[:, -1], fused.shape) == pytest.approx(beta, rel=0.08)
    assert all((p == 1).all() for name, p in hybrid.named_parameters() if "norm" in name)


def test_one_seed_gives_one_model(hybrid):
    from m1.model.hybrid import build_model

    same, other = build_model(SMALL, ALONE, seed=7), build_model(SMALL, ALONE, seed=8)
    for (name, ours), twin, foreign in zip(hybrid.named_parameters(), same.parameters(), other.parameters()):
        assert torch.equal(ours, twin)
        assert ours.dim() == 1 or not torch.equal(ours, foreign), name


def test_experts_and_layers_start_differently(hybrid):
    weights = [p for name, p in hybrid.named_parameters() if name.endswith("linear_fc1.weight")]
    assert len(weights) == SMALL.num_layers * SMALL.num_experts
    assert len({float(weight.detach().sum()) for weight in weights}) == len(weights)


def test_rmsnorm_is_its_formula_in_float32():
    from types import SimpleNamespace

    from m1.model.norm import RMSNorm

    config = SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=True)
    norm = RMSNorm(config, 64, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(64) + 0.5)
    x = (100 * torch.randn(3, 5, 64)).bfloat16()
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    # One rounding to bfloat16, of the result: anything more would show.
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=0)
    assert norm.weight.sequence_parallel
