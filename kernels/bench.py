"""``python -m kernels.bench``: lightning attention against what a user would pick instead, in one run.

A table for people goes to stderr, one JSON object per case to stdout:
``{"case", "metric", "unit", "ours", "peer", "peer_name", "ratio", "spread"}``; ratio above 1 means ours is better.
Ours and the peers run in turn within every repeat; ``ours`` and ``peer`` are medians, ``ratio`` the median of the
ratios of the repeats and ``spread`` their range. On one CPU thread, times are processor times.

Peers: the block loop of transformers' MiniMaxLightningAttention (its projections, norm and activation replaced by
identities), and torch's causal scaled_dot_product_attention. A peer slower than SLOW_SECONDS runs once: the quadratic
peers would need hours otherwise.

Freed memory stays with the process, for ours and peers alike (`keep_freed_memory`): otherwise every tensor above 32 MiB
is mapped and filled with fresh pages at each call, which costs any operation on long sequences a fifth of its time.
"""

import argparse
import ctypes
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import lightning_attention, lightning_decode, lightning_slopes

#: glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
HEADS, HEAD_DIM = 8, 64
LENGTHS = (1024, 4096, 16384, 65536)
QUICK_LENGTHS = (1024, 4096)
REPEATS = 5
SLOW_SECONDS = 30  # a peer's call that takes longer is made once
Contender = tuple[Callable[[], Tensor], tuple[Tensor, ...], Tensor]  # function, its inputs, gradient of its output


@dataclass(frozen=True)
class Case:
    """One point of the comparison."""

    length: int
    dtype: torch.dtype
    backward: bool
    device: str
    heads: int = HEADS

    @property
    def name(self) -> str:
        kind = "forward+backward" if self.backward else "forward"
        return f"{kind} n={self.length} {self.heads}x{HEAD_DIM} {str(self.dtype).removeprefix('torch.')} {self.device}"


class Log:
    """Writes results: JSON lines to stdout, a table to stderr."""

    def __init__(self) -> None:
        self._row("case", "metric", "ours", "peer", "peer name", "ratio", "spread")

    def _row(self, *cells: str) -> None:
        widths = (44, 22, 11, 11, 22, 8, 20)
        print("  ".join(c.ljust(w) for c, w in zip(cells, widths)), file=sys.stderr, flush=True)

    def add(self, case: str, metric: str, unit: str, ours: list[float], peer: list[float], peer_name: str) -> None:
        """Pairs of repeats, lower is better; a single peer value is compared with every one of ours."""
        pairs = list(zip(ours, peer)) if len(peer) == len(ours) else [(x, peer[0]) for x in ours]
        ratios = [p / o if o > 0 else math.inf for o, p in pairs]
        record = {
            "case": case,
            "metric": metric,
            "unit": unit,
            "ours": round(statistics.median(ours), 4),
            "peer": round(statistics.median(peer), 4),
            "peer_name": peer_name,
            "ratio": round(statistics.median(ratios), 3),
            "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        }
        print(json.dumps(record), flush=True)
        low, high = min(ratios), max(ratios)
        self._row(
            case,
            f"{metric} [{unit}]",
            f"{record['ours']:.3f}",
            f"{record['peer']:.3f}",
            peer_name,
            f"{record['ratio']:.2f}",
            f"{low:.2f} .. {high:.2f}",
        )


class _Gate(nn.Module):
    """Stands for the layer's output gate: one number instead of a projection."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(1)


def _transformers_loop(case: Case) -> nn.Module | None:
    try:
        from transformers import MiniMaxConfig
        from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
    except ImportError as error:
        print(f"peer transformers left out: {error}", file=sys.stderr)
        return None
    layers = 8
    config = MiniMaxConfig(
        hidden_size=case.heads * HEAD_DIM,
        num_attention_heads=case.heads,
        head_dim=HEAD_DIM,
        num_hidden_layers=layers,
        layer_types=["linear_attention"] * layers,
    )
    layer = MiniMaxLightningAttention(config, layer_idx=1)
    for name in ("qkv_proj", "act_fn", "norm", "out_proj"):
        setattr(layer, name, nn.Identity())
    layer.output_gate = _Gate()  # type: ignore[assignment]
    return layer.to(case.device, case.dtype)


def _contenders(case: Case, tensors: tuple[Tensor, ...], fused: Tensor) -> dict[str, Contender]:
    """name -> (function, its inputs, gradient of its output)."""
    q, k, v, grad = tensors
    slopes = lightning_slopes(case.heads, 1, 8).to(case.device)
    found: dict[str, Contender] = {
        "ours": (lambda: lightning_attention(q, k, v, slopes), (q, k, v), grad),
        "sdpa": (lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad),
    }
    layer = _transformers_loop(case)
    if layer is not None:
        flat = grad.transpose(1, 2).reshape(1, case.length, -1)
        found["transformers"] = (lambda: layer(fused, None, None)[0], (fused,), flat)
    return found


def _call(function: Callable[[], Tensor], inputs: tuple[Tensor, ...], grad: Tensor, backward: bool) -> None:
    if backward:
        torch.autograd.grad(function(), inputs, grad)
    else:
        with torch.no_grad():
            function()


def _seconds(run: Callable[[], None], device: str) -> float:
    """Wall time; with one CPU thread, processor time, which other programs on the machine disturb less."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def _measure(run: Callable[[], None], device: str) -> tuple[float, float]:
    """(seconds, highest memory above what was in use before the call in bytes, NaN where the system cannot tell)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return _seconds(run, device), torch.cuda.max_memory_allocated() - before
    try:
        # Give freed memory back first, or the allocator would hide what the call needs.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = _status("VmRSS")
        return _seconds(run, device), _status("VmHWM") - before
    except (OSError, AttributeError):
        return _seconds(run, device), math.nan


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def keep_freed_memory() -> None:
    """Have glibc take large blocks from the heap and keep them when they are freed; nothing where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compare(case: Case, log: Log) -> None:
    """Time and peak memory of one case against every peer."""
    torch.manual_seed(0)
    shape = (1, case.heads, case.length, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=case.dtype, device=case.device).requires_grad_() for _ in range(3))
    fused = torch.randn(1, case.length, case.heads * HEAD_DIM * 3, dtype=case.dtype, device=case.device)
    contenders = _contenders(case, (q, k, v, torch.randn_like(q)), fused.requires_grad_())

    def runner(function: Callable[[], Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> Callable[[], None]:
        return lambda: _call(function, inputs, grad, case.backward)

    runs = {name: runner(*contender) for name, contender in contenders.items()}

    input_bytes = 3 * q.numel() * q.element_size()
    memory: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    for name, run in runs.items():
        if name == "ours":
            run()
        seconds, extra = _measure(run, case.device)
        memory[name] = extra / input_bytes
        # The first call of a peer warms it up; only one too slow to repeat counts.
        times[name] = [seconds] if seconds > SLOW_SECONDS else []
    slow = {name for name, spent in times.items() if spent}
    for _ in range(REPEATS):
        for name in runs.keys() - slow:
            times[name].append(_seconds(runs[name], case.device))
    ours = [1e3 * t for t in times["ours"]]
    for name in runs.keys() - {"ours"}:
        log.add(case.name, "time", "ms", ours, [1e3 * t for t in times[name]], name)
        log.add(case.name, "peak extra memory", "x inputs", [memory["ours"]], [memory[name]], name)


def flatness(dtype: torch.dtype, device: str, log: Log) -> None:
    """Time per token at 64K against that at 4K, forward and backward."""
    slopes = lightning_slopes(HEADS, 1, 8).to(device)
    times: dict[int, list[float]] = {4096: [], 65536: []}
    runs = {}
    for n in times:
        q, k, v = (torch.randn(1, HEADS, n, HEAD_DIM, dtype=dtype, device=device).requires_grad_() for _ in range(3))
        grad = torch.randn_like(q)
        runs[n] = lambda q=q, k=k, v=v, g=grad: _call(lambda: lightning_attention(q, k, v, slopes), (q, k, v), g, True)
        runs[n]()
    for _ in range(REPEATS):
        for n, run in runs.items():
            calls = 65536 // n  # as many tokens in either
            times[n].append(sum(_seconds(run, device) for _ in range(calls)) / 65536 * 1e9)
    name = f"forward+backward n=65536 {str(dtype).removeprefix('torch.')} {device}"
    log.add(name, "time per token", "ns", times[65536], times[4096], "ours at n=4096")


def decode(dtype: torch.dtype, device: str, log: Log) -> None:
    """Time per decoded token after 64K tokens against after 1K, batch 1; and ours against plain torch, batch 64."""
    slopes = lightning_slopes(HEADS, 1, 8).to(device)
    label = f"{HEADS}x{HEAD_DIM} {str(dtype).removeprefix('torch.')} {device}"
    states = {}
    for n in (1024, 65536):
        q, k, v = (torch.randn(1, HEADS, n, HEAD_DIM, dtype=dtype, device=device) for _ in range(3))
        _, states[n] = lightning_attention(q, k, v, slopes, output_final_state=True)
    token = tuple(torch.randn(1, HEADS, HEAD_DIM, dtype=dtype, device=device) for _ in range(3))

    def step(state: Tensor, tokens: tuple[Tensor, ...], calls: int) -> float:
        q, k, v = tokens

        def run() -> None:
            for _ in range(calls):
                lightning_decode(q, k, v, slopes, state)

        run()
        return _seconds(run, device) / calls * 1e6

    times: dict[int, list[float]] = {n: [] for n in states}
    for _ in range(20):
        for n, state in states.items():
            times[n].append(step(state, token, 100))
    log.add(f"decode position 65536 {label}", "time per token", "us", times[65536], times[1024], "ours at 1024")

    batch = 64
    tokens = tuple(torch.randn(batch, HEADS, HEAD_DIM, dtype=dtype, device=device) for _ in range(3))
    state = torch.randn(batch, HEADS, HEAD_DIM, HEAD_DIM, device=device)

    def plain() -> None:
        qs, ks, vs = (x.float() for x in tokens)
        new = state * torch.exp(-slopes)[:, None, None] + ks[..., :, None] * vs[..., None, :]
        torch.einsum("bhk,bhkv->bhv", qs, new)

    ours, peer = [], []
    for _ in range(REPEATS):
        ours.append(step(state, tokens, 5))
        peer.append(sum(_seconds(plain, device) for _ in range(5)) / 5 * 1e6)
    log.add(f"decode batch {batch} {label}", "time per step", "us", ours, peer, "torch operations")


def autotune(device: str, dims: tuple[int, ...] = (64, 128, 256), length: int = 16384, heads: int = 16) -> None:
    """Time candidate block sizes of the Triton kernel and print the best beside what is checked in."""
    from kernels.triton_backend import TUNING

    for dtype, dim in itertools.product(TUNING, dims):
        tensors = tuple(torch.randn(1, heads, length, dim, dtype=dtype, device=device) for _ in range(4))
        checked_in, times = TUNING[dtype][dim], {}
        for candidate in itertools.product((32, 64), (16, 32, 64, 128), (4, 8), (1, 2)):
            if candidate[1] > dim:
                continue
            TUNING[dtype][dim] = candidate
            try:
                times[candidate] = _time_triton(tensors, device)
            except RuntimeError as error:  # does not fit into shared memory
                print(f"{dtype} {dim} {candidate}: {error}", file=sys.stderr)
        TUNING[dtype][dim] = checked_in
        best = min(times, key=lambda c: times[c])
        print(f"{dtype} {dim}: {best}  # {1e3 * times[best]:.3f} ms; checked in: {checked_in}", file=sys.stderr)


def _time_triton(tensors: tuple[Tensor, ...], device: str) -> float:
    """Median seconds of a forward and backward pass."""
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    slopes = lightning_slopes(q.shape[1], 1, 8).to(device)

    def run() -> None:
        _call(lambda: lightning_attention(q, k, v, slopes, backend="triton"), (q, k, v), tensors[3], True)

    run()
    return statistics.median(_seconds(run, device) for _ in range(REPEATS))


def check(device: str) -> None:
    """Stop unless the backend agrees with the float64 reference: a fast wrong kernel is not worth a number."""
    from kernels import reference

    slopes = lightning_slopes(2, 0, 2).to(device)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        q, k, v = (torch.randn(1, 2, 700, HEAD_DIM, dtype=dtype, device=device).requires_grad_() for _ in range(3))
        out, expected = lightning_attention(q, k, v, slopes), reference.quadratic(q, k, v, slopes)[0]
        grad = torch.randn_like(out)
        found = (out, *torch.autograd.grad(out, (q, k, v), grad))
        wanted = (expected, *torch.autograd.grad(expected, (q, k, v), grad.double()))
        for name, x, y in zip(("output", "dq", "dk", "dv"), found, wanted):
            error = ((x.double() - y).norm() / y.norm()).item()
            if not error < limit:
                raise SystemExit(f"{name} {dtype} is off by {error:.1e}, above {limit:.0e}: no benchmark")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="1K and 4K only, under a minute")
    parser.add_argument("--lengths", type=int, nargs="+", help=f"only the comparison, at these (default {LENGTHS})")
    parser.add_argument("--heads", type=int, default=HEADS, help=f"heads of the comparison (default {HEADS})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--autotune", action="store_true", help="time Triton block sizes and print the table (cuda)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if options.autotune and options.device != "cuda":
        parser.error("--autotune needs --device cuda")
    torch.set_num_threads(options.threads)
    check(options.device)
    if options.autotune:
        autotune(options.device)
        return
    keep_freed_memory()
    log = Log()
    dtypes = (torch.float32, torch.bfloat16)
    lengths = options.lengths or (QUICK_LENGTHS if options.quick else LENGTHS)
    for dtype in dtypes if not options.lengths else ():
        decode(dtype, options.device, log)
        if not options.quick:
            flatness(dtype, options.device, log)
    for length, dtype, backward in itertools.product(lengths, dtypes, (False, True)):
        compare(Case(length, dtype, backward, options.device, options.heads), log)


if __name__ == "__main__":
    main()
