"""The fused parts of a layer against their definitions in float64, compiled and composed of torch operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import build, fused
from kernels.reference import recurrent

SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 100))
#: The norm of a few small numbers amplifies rounding errors.
NORM_SHAPES = st.tuples(st.integers(1, 70), st.integers(8, 100))
SEEDS = st.integers(0, 2**31)


@pytest.fixture(params=["compiled", "torch"], autouse=True, scope="module")
def way(request):
    """Both ways to compute; the second is what a machine without a compiler has."""
    if request.param == "compiled" and build.load() is None:
        pytest.skip("no C++ compiler here")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(build, "load", lambda: None)
        yield request.param


@pytest.fixture(params=[1, 2], autouse=True, scope="module")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def draw(seed: int, *shapes: tuple[int, ...], scale: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).requires_grad_() for shape in shapes]


def compare(function, reference, inputs: list[torch.Tensor], tolerance: float = 2e-6) -> None:
    """Result and every gradient of `function` in float32 against `reference` in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours, theirs = function(*inputs), reference(*exact)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    pairs = [(ours, theirs)]
    pairs += zip(torch.autograd.grad(ours, inputs, weight), torch.autograd.grad(theirs, exact, weight.double()))
    for mine, other in ((m.detach().double(), o.detach()) for m, o in pairs):
        assert mine.shape == other.shape
        assert (mine - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))


def plain_norm(x, weight, epsilon):
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


@settings(max_examples=30, deadline=None)
@given(NORM_SHAPES, SEEDS)
def test_rms_norm(shape, seed) -> None:
    inputs = draw(seed, shape, shape[-1:])
    compare(lambda x, w: fused.rms_norm(x, w, 1e-5), lambda x, w: plain_norm(x, w, 1e-5), inputs, 1e-5)


@settings(max_examples=30, deadline=None)
@given(NORM_SHAPES, SEEDS, st.floats(0.5, 4.0))
def test_rms_norm_after_a_residual(shape, seed, alpha) -> None:
    compare(
        lambda x, r, w: fused.rms_norm(x, w, 1e-5, residual=r, alpha=alpha),
        lambda x, r, w: plain_norm(x + alpha * r, w, 1e-5),
        draw(seed, shape, shape, shape[-1:]),
        1e-5,
    )


@settings(max_examples=30, deadline=None)
@given(NORM_SHAPES, SEEDS)
def test_rms_norm_before_a_gate(shape, seed) -> None:
    compare(
        lambda x, g, w: fused.rms_norm(x, w, 1e-5, gate=g),
        lambda x, g, w: torch.sigmoid(g) * plain_norm(x, w, 1e-5),
        draw(seed, shape, shape, shape[-1:]),
        1e-5,
    )


@settings(max_examples=30, deadline=None)
@given(SHAPES, SEEDS)
def test_swiglu_and_its_gradients(shape, seed) -> None:
    rows, width = shape
    x, probability, grad = (t.detach() for t in draw(seed, (rows, 2 * width), (rows,), (rows, width)))
    exact, p = x.double().requires_grad_(), probability.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = F.silu(gate) * up * p[:, None]
    wanted = torch.autograd.grad(expected, (exact, p), grad.double())
    found = (fused.swiglu(x, probability), *fused.swiglu_backward(x, probability, grad))
    for mine, other in zip(found, (expected, expected, *wanted), strict=True):
        assert (mine.double() - other.detach()).abs().max() <= 3e-5 * max(1.0, float(other.detach().abs().max()))


@settings(max_examples=30, deadline=None)
@given(SHAPES, SEEDS, st.floats(0.01, 60.0))
def test_label_logprobs(shape, seed, scale) -> None:
    [logits] = draw(seed, shape, scale=scale)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(seed))
    compare(
        lambda x: fused.label_logprobs(x, labels),
        lambda x: x.log_softmax(-1).gather(-1, labels[:, None])[:, 0],
        [logits],
        3e-6,
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70), st.integers(1, 3), SEEDS, st.booleans())
def test_silu_and_lightning_attention(length, batch, seed, packed) -> None:
    batch, heads, dim = 1 if packed else batch, 2, 5
    [qkv] = draw(seed, (length, batch, heads, 3 * dim), scale=1.0)
    slopes = torch.tensor([0.02, 0.7])
    cut = length // 3
    offsets = (0, cut, length) if packed and cut else None

    def reference(x):
        parts = x.split([cut, length - cut]) if offsets else [x]
        mixed = []
        for part in parts:
            q, k, v = F.silu(part).permute(1, 2, 0, 3).split(dim, dim=-1)
            mixed.append(recurrent(q, k, v, slopes)[0].permute(2, 0, 1, 3))
        return torch.cat(mixed)

    compare(lambda x: fused.silu_lightning(x, slopes, offsets), reference, [qkv], 2e-5)


def test_inputs_of_any_strides() -> None:
    x, gate = (t.detach().transpose(0, 1).requires_grad_() for t in draw(3, (6, 5, 32), (6, 5, 32)))
    [weight] = draw(4, (32,))
    compare(
        lambda x, g, w: fused.rms_norm(x, w, 1e-5, gate=g),
        lambda x, g, w: torch.sigmoid(g) * plain_norm(x, w, 1e-5),
        [x, gate, weight],
        1e-5,
    )


def test_extreme_values_stay_finite_and_nan_is_not_hidden() -> None:
    x = torch.tensor([[-200.0, 200.0, 3.0, 1.0]])
    assert torch.allclose(fused.swiglu(x, torch.ones(1)), torch.tensor([[0.0, 200.0]]), rtol=0, atol=1e-30)
    weight = torch.ones(4)
    assert fused.rms_norm(torch.zeros(2, 4), weight, 1e-5).abs().max() == 0
    x = torch.tensor([[1.0, float("nan"), 2.0, 3.0]])
    assert fused.rms_norm(x, weight, 1e-5).isnan().all()
    assert fused.label_logprobs(x, torch.tensor([0])).isnan().all()
    assert fused.swiglu(x, torch.ones(1)).isnan().any()


def test_bfloat16_is_rounded_once() -> None:
    x, w = (t.detach().bfloat16() for t in draw(5, (7, 40), (40,)))
    exact = plain_norm(x.double(), w.double(), 1e-5)
    assert fused.rms_norm(x, w, 1e-5).dtype == torch.bfloat16
    assert ((fused.rms_norm(x, w, 1e-5).double() - exact).abs() <= 2**-7 * exact.abs() + 1e-6).all()


def test_bad_arguments_are_refused() -> None:
    x, weight = torch.zeros(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight must have the shape \(8,\), got \(7,\)"):
        fused.rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match="residual must have the shape"):
        fused.rms_norm(x, weight, 1e-5, residual=x[:2])
    with pytest.raises(ValueError, match="residual and gate exclude each other"):
        fused.rms_norm(x, weight, 1e-5, residual=x, gate=x)
    for label in (-1, 8):
        with pytest.raises(IndexError):
            fused.label_logprobs(x, torch.tensor([0, 1, label]))
