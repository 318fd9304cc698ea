"""Inputs, oracles and error measures shared by the lightning attention tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import lightning_attention, reference
from kernels.checks import state_dtype

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# From no decay at all, over the last layer of an 80-layer model, to one that forgets at once.
SLOPES = (0.0, 3.9e-8, 0.0039, 0.3, 0.917, 4.0, 60.0)


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor
    initial_state: Tensor | None
    offsets: list[int] | None
    grad_out: Tensor
    grad_state: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.initial_state) if x is not None]

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.offsets is None else torch.tensor(self.offsets)


def make_inputs(
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    dim: int = 16,
    slopes: tuple[float, ...] = (0.0, 0.3, 4.0),
    offsets: list[int] | None = None,
    initial: bool = True,
    transposed: bool = True,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    heads = len(slopes)

    def tokens() -> Tensor:
        shape = (batch, length, heads, dim) if transposed else (batch, heads, length, dim)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return x.transpose(1, 2) if transposed else x

    def state() -> Tensor:
        rows = batch if offsets is None else len(offsets) - 1
        x = torch.randn(rows, heads, dim, dim, generator=generator, dtype=torch.float64)
        return x.to(state_dtype(dtype))

    q, k, v = (tokens().requires_grad_() for _ in range(3))
    initial_state = state().requires_grad_() if initial else None
    return Inputs(q, k, v, torch.tensor(slopes), initial_state, offsets, tokens(), state())


def run(inputs: Inputs, backend: str | None) -> list[Tensor]:
    """Output, final state, and the gradients of every leaf."""
    out, state = lightning_attention(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.slopes,
        initial_state=inputs.initial_state,
        cu_seqlens=inputs.cu_seqlens,
        output_final_state=True,
        backend=backend,
    )
    grads = torch.autograd.grad((out, state), inputs.leaves, (inputs.grad_out, inputs.grad_state))
    return [out.detach(), state.detach(), *grads]


def expected(inputs: Inputs, form=reference.quadratic) -> list[Tensor]:
    """The same from a float64 reference form."""
    leaves = [x.detach().double().requires_grad_() for x in inputs.leaves]
    initial = leaves[3] if inputs.initial_state is not None else None
    out, state = form(*leaves[:3], inputs.slopes, initial, inputs.offsets)
    grads = torch.autograd.grad((out, state), leaves, (inputs.grad_out.double(), inputs.grad_state.double()))
    return [out.detach(), state.detach(), *grads]


def worst_error(found: Tensor, wanted: Tensor) -> float:
    """Relative error in norm of the worst head: a weak head must not hide behind a strong one. NaN stays NaN."""
    found, wanted = (x.double().transpose(0, 1).flatten(1) for x in (found, wanted))
    # Strong decay leaves initial states gradients below float32's range: there, an absolute floor.
    return ((found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30)).max().item()


def assert_close(found: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    for name, x, y in zip(("output", "state", "dq", "dk", "dv", "dinitial"), found, wanted, strict=False):
        error = worst_error(x, y)
        assert error < limit, f"{name}: relative error {error:.2e}, limit {limit:.0e}"
    assert len(found) == len(wanted)
