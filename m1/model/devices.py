"""Runs Megatron-core where there is no GPU.

Megatron-core names CUDA in many places: the current device, streams, events, random state, factory functions. On a
machine without a GPU this module maps those calls onto the CPU, once, before Megatron-core is imported; on a machine
with one it does nothing. Nothing else in the project knows which of the two it runs on.
"""

# The functions replaced here are typed for devices that are not there.
# mypy: disable-error-code="assignment,misc,method-assign,return-value"

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from typing import Any

import torch

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "eye", "linspace",
              "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "as_tensor")  # fmt: skip
_ready = False


def has_gpu() -> bool:
    return torch.cuda.is_available()


def backend() -> str:
    """Communication backend of torch.distributed."""
    return "nccl" if has_gpu() else "gloo"


def prepare() -> None:
    """Make Megatron-core importable and usable on this machine. Call before the first Megatron import."""
    global _ready
    if _ready:
        return
    _ready = True
    assert not any(name.startswith("megatron.core.transformer") for name in sys.modules), "prepare() came too late"
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    if has_gpu():
        _import_megatron()
        return
    _map_cuda_to_cpu()
    # Decorated with torch.compile at import, Megatron's fused functions would be compiled at run time, for minutes.
    compile_function, torch.compile = torch.compile, lambda function: function
    try:
        _import_megatron()
    finally:
        torch.compile = compile_function


def _import_megatron() -> None:
    """Import Megatron-core and supply what it leaves undefined without Transformer Engine."""
    import megatron.core.models.gpt  # noqa: F401  (pulls in every decorated function)
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    _keep_step_counter(DistributedOptimizer)
    if not has_gpu():
        random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        _host_split_sizes(token_dispatcher)
        _uneven_parts(mappings)
        param_and_grad_buffer.dist_reduce_scatter_func = _reduce_scatter
        param_and_grad_buffer.dist_all_gather_func = _all_gather


def _to_cpu(device: Any) -> Any:
    """The CPU for any CUDA device in whichever form it is named; other devices unchanged."""
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, str) and device.startswith("cuda"):
        return "cpu"
    if isinstance(device, int) and not isinstance(device, bool):
        return "cpu"
    return device


class _Stream:
    """A stream that does everything at once."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: Any) -> None: ...


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _map_cuda_to_cpu() -> None:
    """Plain replacements of the CUDA functions: measurably cheaper than a TorchFunctionMode."""
    from torch.utils import _device

    _uncompiled_optimizers()

    _device._device_constructors()  # cached before the factories are wrapped: torch.device("meta") needs the originals
    cuda = torch.cuda
    stream = _Stream()

    cuda.current_device = lambda: torch.device("cpu")
    cuda.device_count = lambda: 1
    for name in (
        "set_device",
        "synchronize",
        "empty_cache",
        "set_stream",
        "reset_peak_memory_stats",
        "manual_seed_all",
    ):
        setattr(
            cuda, name, lambda *args, **kwargs: None
        )  # one each: torch's compiler refuses two names of one function
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.device = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.memory_allocated = cuda.max_memory_allocated = cuda.memory_reserved = lambda *args, **kwargs: 0
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.default_generator.manual_seed  # torch.manual_seed itself calls manual_seed_all

    def no_properties(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no CUDA device")  # the exception that torch's own code expects here

    cuda.get_device_properties = no_properties
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.to = _moved(torch.Tensor.to)
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    # Megatron compares type strings to tell gradient kinds apart.
    original_type = torch.Tensor.type

    def type_named(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original_type(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_named


def _uncompiled_optimizers() -> None:
    """Have torch's optimizers call their own methods directly.

    torch marks them to stay out of torch.compile, and the first call of a marked one imports the compiler: 5 seconds in
    every process, for nothing where nothing is compiled.
    """
    for attribute in vars(torch.optim.Optimizer).values():
        method = getattr(attribute, "__wrapped__", None)
        if method is not None:
            method.__dynamo_disable = method
    step = torch.optim.Adam.step.__wrapped__  # type: ignore[attr-defined]
    torch.optim.Adam.step = torch.no_grad()(step)


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return on_cpu


def _moved(to: Any) -> Any:
    @functools.wraps(to)
    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if args and isinstance(args[0], (str, torch.device)):
            args = (_to_cpu(args[0]), *args[1:])
        return to(self, *args, **kwargs)

    return moved


def _host_split_sizes(token_dispatcher: Any) -> None:
    """All-to-all takes its split sizes as host integers; without a device to copy from, Megatron skips that step."""
    original = token_dispatcher.maybe_move_tensor_to_cpu

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if torch.is_tensor(tensor) and as_numpy:
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _uneven_parts(mappings: Any) -> None:
    """gloo gathers and scatters equal parts only; unequal ones are padded to the largest and cut again."""
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def padded(part: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.cat((part, part.new_zeros(rows - len(part), *part.shape[1:])))

    def gather_parts(part: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or group.size() == 1:
            return gather(part, group, sizes, use_global_buffer)
        whole = gather(padded(part, max(sizes)), group)
        return torch.cat([x[:size] for x, size in zip(whole.split(max(sizes)), sizes, strict=True)])

    def scatter_parts(whole: Any, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None or group.size() == 1:
            return scatter(whole, group, sizes, use_global_buffer)
        rows = torch.cat([padded(x, max(sizes)) for x in whole.split(sizes)])
        return scatter(rows, group)[: sizes[group.rank()]]

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_parts, scatter_parts


def _reduce_scatter(part: torch.Tensor, whole: torch.Tensor, op: Any, group: Any, async_op: bool) -> None:
    """The sum over a group's ranks of everyone's `whole`, of which this rank keeps its `part`, a view of `whole`.

    Ranks send each other just what each needs: gloo's own takes three times as long (docs/planning.md). Terms are added
    in the order of the ranks, so the sum is the same on every run.
    """
    assert op == torch.distributed.ReduceOp.SUM and not async_op, "Megatron is not asked for anything else"
    terms = [part if i == group.rank() else torch.empty_like(part) for i in range(group.size())]
    _exchange(list(whole.chunk(group.size())), terms, group)
    total, *others = terms
    for term in others:
        total += term
    if total is not part:
        part.copy_(total)


def _all_gather(whole: torch.Tensor, part: torch.Tensor, group: Any, async_op: bool) -> None:
    """Everyone's `part` in `whole`, of which `part` is a view; in two thirds of the time that gloo's own takes."""
    assert not async_op, "Megatron is not asked for anything else"
    _exchange([part] * group.size(), list(whole.chunk(group.size())), group)


def _exchange(sent: list[torch.Tensor], received: list[torch.Tensor], group: Any) -> None:
    """Send the i-th tensor to the i-th rank of the group, and receive the i-th from it; this rank's own stay."""
    others = [i for i in range(group.size()) if i != group.rank()]
    works: list[Any] = [torch.distributed.irecv(received[i], group=group, group_src=i) for i in others]
    works += [torch.distributed.isend(sent[i], group=group, group_dst=i) for i in others]
    for work in works:
        work.wait()


def _keep_step_counter(distributed_optimizer: Any) -> None:
    """Loading a checkpoint sets each parameter's states, but torch's AdamW has one more, the step, already loaded."""
    original = distributed_optimizer._set_main_param_and_optimizer_states

    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            tensors.setdefault("step", state["step"])
        original(self, model_param, tensors)

    distributed_optimizer._set_main_param_and_optimizer_states = set_states
