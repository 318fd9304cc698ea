"""Bad input: a ValueError that names the argument and what was expected."""

import pytest
import torch

from kernels import lightning_attention, lightning_decode, lightning_slopes


def arguments(**changed):
    found = {name: torch.randn(1, 2, 8, 4) for name in "qkv"} | {"slopes": torch.tensor([0.1, 0.5])}
    return found | changed


def x(*shape, **options):
    return torch.zeros(shape, **options)


CASES = {
    "q-rank": ({"q": x(2, 8, 4)}, r"q must have shape \(batch, heads, sequence, head_dim\).*\(2, 8, 4\)"),
    "q-empty": ({n: x(1, 2, 0, 4) for n in "qkv"}, "q must have shape .* without an empty dimension"),
    "q-dtype": ({n: x(1, 2, 8, 4, dtype=torch.int32) for n in "qkv"}, "q must be float32.*int32"),
    "k-shape": ({"k": x(1, 2, 9, 4)}, "k must have the shape of q"),
    "v-dtype": ({"v": x(1, 2, 8, 4, dtype=torch.bfloat16)}, "v must have the dtype of q"),
    "k-device": ({"k": x(1, 2, 8, 4, device="meta")}, "k must be on the device of q, cpu, got meta"),
    "slopes-shape": ({"slopes": x(3)}, r"slopes must have shape \(heads,\) = \(2,\)"),
    "slopes-rounded": ({"slopes": x(2, dtype=torch.bfloat16)}, "slopes must be float32"),
    "slopes-negative": ({"slopes": torch.tensor([0.1, -0.1])}, "slopes must be finite and not negative"),
    "slopes-nan": ({"slopes": torch.tensor([0.1, float("nan")])}, "slopes must be finite and not negative"),
    "slopes-infinite": ({"slopes": torch.tensor([0.1, float("inf")])}, "slopes must be finite and not negative"),
    "slopes-trainable": ({"slopes": torch.tensor([0.1, 0.2], requires_grad=True)}, "slopes must not require"),
    "slopes-device": ({"slopes": x(2, device="meta")}, "slopes must be on the device of q"),
    "state-shape": ({"initial_state": x(2, 2, 4, 4)}, r"initial_state must have shape.*\(1, 2, 4, 4\)"),
    "state-dtype": (
        {"initial_state": x(1, 2, 4, 4, dtype=torch.bfloat16)},
        "initial_state must be torch.float32",
    ),
    "state-packed": (
        {"initial_state": x(1, 2, 4, 4), "cu_seqlens": torch.tensor([0, 3, 8])},
        r"initial_state must have shape.*\(2, 2, 4, 4\)",
    ),
    "offsets-dtype": ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "cu_seqlens must be an int32 or int64"),
    "offsets-short": ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens must be an int32 or int64"),
    "offsets-end": ({"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens must start at 0 and end at the sequence"),
    "offsets-start": ({"cu_seqlens": torch.tensor([1, 8])}, "cu_seqlens must start at 0"),
    "offsets-order": ({"cu_seqlens": torch.tensor([0, 5, 3, 8])}, "cu_seqlens must increase strictly.*5, 3"),
    "offsets-empty": ({"cu_seqlens": torch.tensor([0, 5, 5, 8])}, "cu_seqlens must increase strictly"),
    "offsets-batch": (
        {n: x(2, 2, 8, 4) for n in "qkv"} | {"cu_seqlens": torch.tensor([0, 8])},
        "q must have batch 1 when cu_seqlens is given",
    ),
    "backend": ({"backend": "fast"}, "backend must be None or one of reference, torch, cpu, triton"),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_names_the_argument(name):
    changed, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        lightning_attention(**arguments(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": x(1, 2, 3, 4)}, r"q must have shape \(batch, heads, head_dim\)"),
        ({"v": x(1, 2, 5)}, "v must have the shape of q"),
        ({"state": x(1, 2, 4, 3)}, "state must have shape"),
        ({"state": x(1, 2, 4, 4, dtype=torch.bfloat16)}, "state must be torch.float32"),
        ({"slopes": x(2) - 1}, "slopes must be finite and not negative"),
    ],
)
def test_decode_names_the_argument(changed, message):
    good = {name: torch.randn(1, 2, 4) for name in "qkv"} | {"slopes": x(2), "state": x(1, 2, 4, 4)}
    lightning_decode(**good)
    with pytest.raises(ValueError, match=message):
        lightning_decode(**(good | changed))


@pytest.mark.parametrize(
    ("values", "message"),
    [((0, 0, 4), "num_heads"), ((4, 0, 0), "num_layers"), ((4, 4, 4), "layer_index"), ((4, -1, 4), "layer_index")],
)
def test_slopes_name_the_argument(values, message):
    with pytest.raises(ValueError, match=message):
        lightning_slopes(*values)
