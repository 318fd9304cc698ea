"""Lightning attention against float64 references, and the invariants of the recurrence."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_cases import LIMIT, SLOPES, assert_close, expected, make_inputs, run, worst_error

from kernels import blockwise, build, lightning_attention, lightning_slopes, reference

BACKENDS = ("cpu", "torch")
DTYPES = (torch.float32, torch.bfloat16)


@st.composite
def cases(draw):
    length = draw(st.one_of(st.integers(1, 260), st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129])))
    offsets = None
    if draw(st.booleans()):
        inner = draw(st.sets(st.integers(1, length - 1), max_size=5)) if length > 1 else set()
        offsets = [0, *sorted(inner), length]
    return {
        "length": length,
        "offsets": offsets,
        "batch": 1 if offsets else draw(st.integers(1, 2)),
        "dim": draw(st.sampled_from([1, 3, 8, 16, 20, 32, 48, 64])),
        "slopes": tuple(draw(st.lists(st.sampled_from(SLOPES), min_size=1, max_size=3))),
        "initial": draw(st.booleans()),
        "transposed": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def test_the_two_references_agree():
    for offsets in (None, [0, 1, 30, 90]):
        inputs = make_inputs(90, slopes=SLOPES, offsets=offsets)
        assert_close(expected(inputs, reference.quadratic), expected(inputs, reference.recurrent), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases())
@settings(max_examples=25, deadline=None)
def test_matches_the_reference(backend, dtype, case):
    inputs = make_inputs(dtype=dtype, **case)
    assert_close(run(inputs, backend), expected(inputs), LIMIT[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_long_sequence_matches_the_recurrence(dtype):
    # Beyond one segment of the torch form, no multiple of any block, and the decay of a model's last layer.
    inputs = make_inputs(4099, dtype=dtype, dim=8, slopes=(0.0, 3.9e-8, 0.01, 0.9))
    wanted = expected(inputs, reference.recurrent)
    for backend in BACKENDS:
        assert_close(run(inputs, backend), wanted, LIMIT[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decay_near_one_does_not_drift(backend):
    # All-positive tokens: every rounding of the decay would push the same way. The oracle is float64 in blocks.
    slopes = torch.tensor([0.0, 1e-7, 1e-5, 1e-3])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, 4, 65536, 4, generator=generator) for _ in range(3))
    out = lightning_attention(q, k, v, slopes, backend=backend)
    wanted = lightning_attention(q.double(), k.double(), v.double(), slopes.double(), backend="torch")
    assert worst_error(out, wanted) < LIMIT[torch.float32]


def test_float16_and_the_reference_backend():
    inputs = make_inputs(130, dtype=torch.float16, dim=32)
    for backend in ("cpu", "torch", "reference"):
        assert_close(run(inputs, backend), expected(inputs), LIMIT[torch.float16])


@pytest.mark.parametrize("dim", [128, 200, 256])
def test_wide_heads(dim):
    inputs = make_inputs(70, dim=dim, slopes=(0.05, 0.9))
    assert_close(run(inputs, "cpu"), expected(inputs), LIMIT[torch.float32])


@pytest.mark.parametrize("offsets", [None, [0, 1, 40, 70]], ids=["plain", "packed"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend, offsets):
    inputs = make_inputs(70, dtype=torch.float64, dim=2, slopes=(0.0, 0.5), offsets=offsets)

    def function(q, k, v, state):
        return lightning_attention(
            q,
            k,
            v,
            inputs.slopes,
            initial_state=state,
            cu_seqlens=inputs.cu_seqlens,
            output_final_state=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(function, inputs.leaves, fast_mode=True)


def test_compiled_kernel_is_in_use():
    if build.load() is None:
        pytest.skip("no compiled kernel on this machine (no C++ compiler): the cpu backend is the torch form")
    inputs = make_inputs(100)
    compiled, plain = run(inputs, "cpu"), run(inputs, "torch")
    assert_close(compiled, plain, 1e-6)
    # Same numbers up to rounding, but not the same bits: two different programs ran.
    assert any(not torch.equal(x, y) for x, y in zip(compiled, plain))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_one_by_one_bit_for_bit(backend):
    inputs = make_inputs(150, offsets=[0, 3, 67, 150])
    together = run(inputs, backend)
    for i, (a, b) in enumerate(itertools.pairwise(inputs.offsets)):
        out, state = lightning_attention(
            *(x[:, :, a:b] for x in (inputs.q, inputs.k, inputs.v)),
            inputs.slopes,
            initial_state=inputs.initial_state[i : i + 1],
            output_final_state=True,
            backend=backend,
        )
        assert torch.equal(out, together[0][:, :, a:b])
        assert torch.equal(state[0], together[1][i])


@pytest.mark.parametrize("backend", BACKENDS)
@given(cut=st.integers(1, 199), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_state_carries_a_cut_sequence(backend, cut, seed):
    inputs = make_inputs(200, seed=seed)
    whole = run(inputs, backend)
    parts, state = [], inputs.initial_state
    for piece in (slice(0, cut), slice(cut, 200)):
        out, state = lightning_attention(
            *(x[:, :, piece] for x in (inputs.q, inputs.k, inputs.v)),
            inputs.slopes,
            initial_state=state,
            output_final_state=True,
            backend=backend,
        )
        parts.append(out)
    grads = torch.autograd.grad((torch.cat(parts, 2), state), inputs.leaves, (inputs.grad_out, inputs.grad_state))
    assert_close([torch.cat(parts, 2), state, *grads], whole, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_sees_a_later_one(backend):
    inputs = make_inputs(140)
    before = run(inputs, backend)[0]
    with torch.no_grad():
        for x in (inputs.q, inputs.k, inputs.v):
            x[:, :, 77:] = 1e4
    after = run(inputs, backend)[0]
    assert torch.equal(before[:, :, :77], after[:, :, :77])
    assert not torch.equal(before[:, :, 77:], after[:, :, 77:])


def test_any_memory_layout_gives_the_same_result():
    plain = make_inputs(100, dim=16, batch=2, transposed=False)
    wanted = run(plain, "cpu")
    fused = torch.cat([plain.q, plain.k, plain.v], dim=-1).detach().transpose(1, 2).contiguous()
    views = [x.transpose(1, 2) for x in fused.split(16, dim=-1)]
    columns = [x.detach().mT.contiguous().mT for x in (plain.q, plain.k, plain.v)]
    for q, k, v in (views, columns):
        out = lightning_attention(q, k, v, plain.slopes, initial_state=plain.initial_state, backend="cpu")
        assert torch.equal(out, wanted[0])
    # The output follows the order of q's dimensions in memory, so merging heads copies nothing.
    merged = lightning_attention(*views, plain.slopes).transpose(1, 2)
    assert merged.is_contiguous()
    # A gradient that is one number repeated has stride 0 everywhere.
    out = lightning_attention(plain.q, plain.k, plain.v, plain.slopes, backend="cpu")
    (summed,) = torch.autograd.grad(out.sum(), plain.q, retain_graph=True)
    (ones,) = torch.autograd.grad(out, plain.q, torch.ones_like(out))
    assert torch.equal(summed, ones)


def test_only_the_inputs_are_kept_for_backward():
    inputs = make_inputs(3000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        lightning_attention(inputs.q, inputs.k, inputs.v, inputs.slopes, initial_state=inputs.initial_state)
    allowed = {x.data_ptr() for x in (*inputs.leaves, inputs.slopes)}
    assert kept and {x.data_ptr() for x in kept} <= allowed


def test_several_threads_give_the_same_bits():
    inputs = make_inputs(200, batch=2)
    one = run(inputs, "cpu")
    torch.set_num_threads(2)
    assert all(torch.equal(x, y) for x, y in zip(one, run(inputs, "cpu")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_touch_the_precision(backend):
    inputs = make_inputs(100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(inputs, backend)
    assert all(x.dtype == torch.float32 for x in found)
    assert_close(found, expected(inputs), LIMIT[torch.float32])


def test_unused_output_or_state_gives_the_gradient_of_the_other():
    inputs = make_inputs(90)
    _, state = lightning_attention(
        inputs.q, inputs.k, inputs.v, inputs.slopes, initial_state=inputs.initial_state, output_final_state=True
    )
    leaves = [x.detach().double().requires_grad_() for x in inputs.leaves]
    _, wanted_state = reference.recurrent(*leaves[:3], inputs.slopes, leaves[3])
    found = torch.autograd.grad(state, inputs.leaves, inputs.grad_state, retain_graph=True)
    wanted = torch.autograd.grad(wanted_state, leaves[1:], inputs.grad_state.double())
    assert not found[0].any()  # the state does not depend on q
    assert_close(list(found[1:]), list(wanted), LIMIT[torch.float32])


def test_gradient_of_a_gradient_is_refused():
    inputs = make_inputs(10)
    out = lightning_attention(inputs.q, inputs.k, inputs.v, inputs.slopes)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_segments_cover_every_token_once():
    for start, end in ((0, 1), (5, 69), (0, 2048), (3, 5000)):
        pieces = list(blockwise._segments(start, end))
        assert [t for a, b in pieces for t in range(a, b)] == list(range(start, end))
        assert all((b - a) % blockwise.BLOCK == 0 for a, b in pieces[:-1])


@pytest.mark.parametrize("heads", [1, 2, 8, 64])
def test_slopes_of_a_power_of_two(heads):
    found = lightning_slopes(heads, 3, 80)
    wanted = [2 ** (-8 * (h + 1) / heads) * (1 - 3 / 79 + 1e-5) for h in range(heads)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-7, atol=0)


def test_slopes_of_other_head_counts_interleave():
    finer = lightning_slopes(16, 0, 4)
    assert torch.equal(lightning_slopes(12, 0, 4), torch.cat([lightning_slopes(8, 0, 4), finer[0:8:2]]))
    assert lightning_slopes(3, 0, 1).tolist() == pytest.approx([x * (1 + 1e-5) for x in (2**-4, 2**-8, 2**-2)])


def test_last_layer_hardly_forgets():
    last = lightning_slopes(64, 79, 80)
    assert 0 < last.max() < 1e-5


def test_worst_error_sees_a_nan_and_a_weak_head():
    good = torch.stack([torch.ones(4), 1e-6 * torch.ones(4)])[None]
    bad = good.clone()
    bad[0, 1] *= 1.1
    assert worst_error(bad, good) == pytest.approx(0.1, rel=1e-3)
    bad[0, 0, 0] = float("nan")
    assert not worst_error(bad, good) < 1.0
