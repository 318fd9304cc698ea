"""The Triton kernel against float64, on a GPU or under Triton's interpreter on the CPU."""

import importlib.util
import os

import pytest
import torch
from lightning_cases import LIMIT, assert_close, expected, make_inputs, run

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed (pip install --no-deps triton)", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it is imported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_device(inputs):
    for name in ("q", "k", "v", "initial_state"):
        x = getattr(inputs, name)
        if x is not None:
            setattr(inputs, name, x.detach().to(DEVICE).requires_grad_())
    for name in ("slopes", "grad_out", "grad_state"):
        setattr(inputs, name, getattr(inputs, name).to(DEVICE))
    return inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "case",
    [
        {"length": 1},
        {"length": 64, "batch": 2, "transposed": False},
        {"length": 150, "dim": 20, "initial": False},
        {"length": 150, "offsets": [0, 1, 64, 66, 150]},
        {"length": 70, "dim": 64, "slopes": (0.0, 0.9)},
    ],
    ids=str,
)
def test_matches_the_reference(case, dtype):
    inputs = on_device(make_inputs(dtype=dtype, **case))
    assert_close(run(inputs, "triton"), expected(inputs), LIMIT[dtype])


@pytest.mark.parametrize("dim", [128, 256])
def test_wide_heads(dim):
    inputs = on_device(make_inputs(70, dtype=torch.bfloat16, dim=dim, slopes=(0.3,)))
    assert_close(run(inputs, "triton"), expected(inputs), LIMIT[torch.bfloat16])


@pytest.mark.parametrize("offsets", [None, [0, 100, 101, 300]], ids=["plain", "packed"])
def test_a_long_sequence_is_cut_into_segments(monkeypatch, offsets):
    from kernels import triton_backend

    monkeypatch.setattr(triton_backend, "MIN_SEGMENT", 64)
    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 1000)
    inputs = on_device(make_inputs(300, batch=1 if offsets else 2, offsets=offsets))
    table, _ = triton_backend._segments(
        tuple(offsets or (0, 300)), inputs.q.shape[0], triton_backend._tokens_per_segment(inputs.q), inputs.q.device
    )
    assert len(table) > (3 if offsets else 2)
    assert_close(run(inputs, "triton"), expected(inputs), LIMIT[torch.float32])


def test_autotune_leaves_the_table_as_it_was(capsys):
    from kernels import bench, triton_backend

    before = {dtype: dict(table) for dtype, table in triton_backend.TUNING.items()}
    bench.REPEATS, repeats = 1, bench.REPEATS
    bench.autotune(DEVICE, dims=(16,), length=8, heads=1)
    bench.REPEATS = repeats
    assert before == triton_backend.TUNING
    assert capsys.readouterr().err.count("checked in") == 3


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((1, 1, 4, 320), torch.float32, "head_dim up to 256"), ((1, 1, 4, 16), torch.float64, "float64")],
)
def test_what_the_kernel_cannot_do_is_refused(shape, dtype, message):
    q = torch.randn(shape, dtype=dtype, device=DEVICE)
    from kernels import lightning_attention

    with pytest.raises(ValueError, match=f"backend 'triton' takes.*{message}"):
        lightning_attention(q, q, q, torch.zeros(1, device=DEVICE), backend="triton")
