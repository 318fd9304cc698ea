"""Decoding: token by token against the training form, prefill, padding, and transformers' layer as an oracle."""

import pytest
import torch
import torch.nn.functional as F
from lightning_cases import LIMIT, make_inputs, worst_error

from kernels import lightning_attention, lightning_decode, lightning_slopes, reference

SLOPES = lightning_slopes(4, 6, 8)  # a layer that forgets slowly: errors would add up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_thousand_steps_match_the_training_form(dtype):
    torch.manual_seed(0)
    q, k, v = (F.silu(torch.randn(2, 4, 2000, 16)).to(dtype) for _ in range(3))
    wanted, final = lightning_attention(q, k, v, SLOPES, output_final_state=True)
    state, out = torch.zeros(2, 4, 16, 16), []
    for q_t, k_t, v_t in zip(q.unbind(2), k.unbind(2), v.unbind(2)):
        token, state = lightning_decode(q_t, k_t, v_t, SLOPES, state)
        out.append(token)
    assert token.dtype == dtype and state.dtype == torch.float32
    assert worst_error(torch.stack(out, 2), wanted) < LIMIT[dtype]
    assert worst_error(state, final) < 1e-5


@pytest.mark.parametrize("dim", [1, 5, 16, 40, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_step_matches_the_recurrence(dtype, dim):
    inputs = make_inputs(1, dtype=dtype, batch=3, dim=dim)
    q, k, v = (x.detach()[:, :, 0] for x in (inputs.q, inputs.k, inputs.v))
    state = inputs.initial_state.detach()
    before = state.clone()
    out, new = lightning_decode(q, k, v, inputs.slopes, state)
    wanted, wanted_state = reference.recurrent(inputs.q, inputs.k, inputs.v, inputs.slopes, inputs.initial_state)
    assert torch.equal(state, before)
    assert worst_error(out[:, :, None], wanted.detach()) < LIMIT[dtype]
    assert worst_error(new, wanted_state.detach()) < LIMIT[new.dtype]


def test_a_step_with_gradients_matches_the_step_without():
    inputs = make_inputs(1, batch=2, dim=16)
    q, k, v = (x[:, :, 0] for x in (inputs.q, inputs.k, inputs.v))
    out, new = lightning_decode(q, k, v, inputs.slopes, inputs.initial_state)
    assert out.requires_grad and new.requires_grad
    with torch.no_grad():
        plain, plain_new = lightning_decode(q, k, v, inputs.slopes, inputs.initial_state)
    assert worst_error(out.detach(), plain) < 1e-6
    assert worst_error(new.detach(), plain_new) < 1e-6


def test_prefill_then_decode_continues_the_sequence():
    inputs = make_inputs(90, batch=2, initial=False)
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    wanted = lightning_attention(q, k, v, inputs.slopes)
    _, state = lightning_attention(q[:, :, :89], k[:, :, :89], v[:, :, :89], inputs.slopes, output_final_state=True)
    out, _ = lightning_decode(q[:, :, 89], k[:, :, 89], v[:, :, 89], inputs.slopes, state)
    assert worst_error(out, wanted[:, :, 89]) < 1e-5


def test_padding_does_not_reach_the_state():
    """Prompts of unequal length, prefilled packed or padded on the left with zeroed values, give the same states."""
    inputs = make_inputs(60, initial=False)
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    _, packed = lightning_attention(
        q, k, v, inputs.slopes, cu_seqlens=torch.tensor([0, 20, 60]), output_final_state=True
    )
    padded_k = torch.cat([k[:, :, :20].roll(1, 3), k[:, :, :20]], dim=2)  # 20 tokens of padding, then the prompt
    padded_v = torch.cat([torch.zeros_like(v[:, :, :20]), v[:, :, :20]], dim=2)
    _, padded = lightning_attention(q[:, :, :40], padded_k, padded_v, inputs.slopes, output_final_state=True)
    _, alone = lightning_attention(q[:, :, 20:], k[:, :, 20:], v[:, :, 20:], inputs.slopes, output_final_state=True)
    assert worst_error(packed[:1], padded) < 1e-6
    assert torch.equal(packed[1:], alone)


def test_matches_the_layer_of_transformers():
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    heads, dim, length = 4, 16, 300
    config = MiniMaxConfig(
        hidden_size=32,
        num_attention_heads=heads,
        head_dim=dim,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 4,
    )
    torch.manual_seed(0)
    layer = MiniMaxLightningAttention(config, layer_idx=2)
    slopes = lightning_slopes(heads, 2, 4)
    # Their layer factor divides by L-1+1e-5 instead of L-1.
    torch.testing.assert_close(slopes, layer.slope_rate.flatten(), rtol=1e-5, atol=0)

    def ours(hidden):
        qkv = F.silu(layer.qkv_proj(hidden)).unflatten(-1, (heads, 3 * dim)).transpose(1, 2)
        merged = lightning_attention(*qkv.split(dim, dim=-1), slopes).transpose(1, 2).flatten(2)
        return layer.out_proj(torch.sigmoid(layer.output_gate(hidden)) * layer.norm(merged))

    hidden = torch.randn(2, length, 32, requires_grad=True)
    inputs = [hidden, *layer.parameters()]
    grad = torch.randn(2, length, 32)
    found, wanted = ours(hidden), layer(hidden, None, None)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for x, y in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad)):
        assert (x - y).norm() < 2e-5 * y.norm()
