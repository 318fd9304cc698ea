"""`m1 bench train`: a training step of this project against plain transformers, on the same cores.

Both sides start from the same weights and see the same batches; the first losses must agree, or nothing is timed. Each
side has its own processes on the same cores, and they take turns: while one side runs a few steps the other waits on
its standard input. Ours runs one data-parallel rank on each core. The peer is transformers' `MiniMaxForCausalLM`
with a plain loop of forward, backward, gradient clipping and fused AdamW; it runs in whichever of several ways a short
trial finds fastest: one process with all cores as threads, or a rank of torch's DistributedDataParallel on each core;
with transformers' own loop over experts, or with its grouped matrix products.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from m1 import paths
from m1.config.pretrain import Pretrain
from m1.config.profile import Profile
from m1.errors import StageFailed, UsageError
from m1.training.environment import KEEP_MEMORY

#: Tokens of a step at every sequence length, as far as they fill one sequence for each core.
TOKENS = 8192
LENGTHS = (512, 4096)
#: Largest difference of the first loss, by precision.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


@dataclass(frozen=True)
class Way:
    """How a side runs.

    Attributes:
        ranks: processes.
        threads: of each.
        autocast: bfloat16 autocast around the peer's forward pass; its weights stay float32.
        experts: transformers' implementation of the experts, for the peer.
    """

    ranks: int
    threads: int
    autocast: bool = False
    experts: str = "eager"

    def __str__(self) -> str:
        processes = f"{self.ranks} DDP ranks" if self.ranks > 1 else "1 process"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{processes} of {threads}, experts {self.experts}{', bf16 autocast' if self.autocast else ''}"


@dataclass(frozen=True)
class Task:
    """What a worker needs to know, written to a file for it.

    Attributes:
        model, optimizer: sections of the profile as plain values.
        weights: folder where our rank 0 puts the weights in transformers' layout for the peer.
        cores: which the processes may use.
    """

    side: Literal["ours", "peer"]
    model: dict[str, Any]
    optimizer: dict[str, Any]
    precision: Literal["fp32", "bf16"]
    sequence_length: int
    batch_size: int
    seed: int
    weights: str
    cores: list[int]
    way: dict[str, Any]


class Side:
    """The processes of one side; a context manager that ends them.

    Raises:
        StageFailed: a worker ended early; its error is on stderr.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.way = task, Way(**task.way)
        file = folder / f"{task.side}-{time.monotonic_ns()}.json"
        file.write_text(json.dumps(asdict(task)), encoding="utf-8")
        port = _free_port()
        self.workers = []
        for rank in range(self.way.ranks):
            environment = {
                **os.environ,
                **KEEP_MEMORY,  # for both sides
                "OMP_NUM_THREADS": str(self.way.threads),
                "OMP_WAIT_POLICY": "PASSIVE",  # a waiting side must leave the cores alone
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.way.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "PYTHONPATH": os.pathsep.join([str(paths.ROOT), os.environ.get("PYTHONPATH", "")]),
            }
            command = [sys.executable, "-m", "m1.training.bench_worker", str(file)]
            self.workers.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    cwd=paths.ROOT,
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    encoding="utf-8",
                    errors="replace",
                )
            )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.stdin.close()  # type: ignore[union-attr]
        for worker in self.workers:
            try:
                worker.wait(timeout=20)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()

    def ask(self, operation: str, steps: int = 0) -> list[dict[str, Any]]:
        """Have every rank do something; their answers, rank by rank."""
        for worker in self.workers:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps({"do": operation, "steps": steps}), file=worker.stdin, flush=True)
        answers = []
        for rank, worker in enumerate(self.workers):
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line:
                raise StageFailed(
                    f"bench train: rank {rank} of {self.task.side} ended with code {worker.wait()}",
                    "Its last lines are above; fix what they say and start again.",
                )
            answers.append(json.loads(line))
        return answers

    def steps(self, count: int) -> tuple[float, float]:
        """Run `count` steps; (seconds of one, by the slowest rank, loss of the last)."""
        answers = self.ask("steps", count)
        return max(answer["seconds"] for answer in answers) / count, answers[0]["loss"]


def bench(
    settings: Profile,
    *,
    lengths: Sequence[int] = LENGTHS,
    quick: bool = False,
    precision: Literal["fp32", "bf16"] | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    write: Callable[[dict[str, Any]], None] = lambda record: print(json.dumps(record), flush=True),
) -> None:
    """Measure every length; one JSON object per result to `write`, a table for people to `say`.

    Args:
        quick: two rounds of one step at the first length, one way for the peer.
        precision: of both sides, by default the profile's. In bfloat16 the peer may use autocast or stay in float32.

    Raises:
        UsageError: a length does not fit the model, or there are fewer cores than the profile's ranks.
        StageFailed: a side failed, or their losses differ.
    """
    chosen = precision or settings.parallel.precision
    wanted = settings.parallel.world_size * settings.parallel.threads_per_rank
    available = sorted(os.sched_getaffinity(0))
    if len(available) < wanted:
        raise UsageError(
            f"bench train: profile {settings.name} uses {wanted} cores, and {len(available)} are there",
            "Use a smaller profile or another machine.",
        )
    for length in lengths:
        if length > settings.model.max_position_embeddings:
            raise UsageError(
                f"bench train: length {length} exceeds model.max_position_embeddings="
                f"{settings.model.max_position_embeddings}",
                "Give a smaller --length.",
            )
    cores = available[:wanted]
    say(f"profile {settings.name}, {chosen}, cores {cores}; other work on them spoils the numbers")
    for length in lengths[:1] if quick else lengths:
        batch = max(wanted, TOKENS // length // wanted * wanted)
        with tempfile.TemporaryDirectory(prefix="m1-bench-") as name:
            _one_length(settings, Path(name), length, batch, chosen, cores, quick, say, write)


def _one_length(
    settings: Profile,
    folder: Path,
    length: int,
    batch: int,
    precision: Literal["fp32", "bf16"],
    cores: list[int],
    quick: bool,
    say: Callable[[str], None],
    write: Callable[[dict[str, Any]], None],
) -> None:
    def task(side: Literal["ours", "peer"], way: Way) -> Task:
        optimizer = {"weight_decay": 0.1, **settings.section("pretrain", Pretrain).optimizer.model_dump()}
        model = settings.model.model_dump()
        weights = str(folder / "weights")
        return Task(
            side, model, optimizer, precision, length, batch, settings.seed, weights, cores, asdict(way)
        )  # fmt: skip

    rounds, steps, warm = (2, 1, 1) if quick else (7, 3, 2)
    case = f"train step {settings.name} sequence {length} batch {batch} {precision}"
    layout = Way(settings.parallel.world_size, settings.parallel.threads_per_rank)
    with Side(task("ours", layout), folder) as ours:
        ours.ask("export")
        way = _fastest(task, folder, len(cores), precision, quick, say)
        with Side(task("peer", way), folder) as peer:
            _compare_losses(ours, peer, precision, say)
            ours.steps(warm), peer.steps(warm)
            pairs = [(ours.steps(steps)[0], peer.steps(steps)[0]) for _ in range(rounds)]
            report(case, batch * length, pairs, f"transformers, {way}", say, write)
            parts(case, ours, peer, steps, say, write)


def _fastest(
    task: Callable[[Literal["ours", "peer"], Way], Task],
    folder: Path,
    cores: int,
    precision: str,
    quick: bool,
    say: Callable[[str], None],
) -> Way:
    """The peer's fastest way, by a short trial of each."""
    processes = [(1, cores), (cores, 1)] if cores > 1 else [(1, 1)]
    casts = (False, True) if precision == "bf16" else (False,)
    ways = [Way(r, t, a, e) for (r, t), a, e in itertools.product(processes, casts, ("eager", "grouped_mm"))]
    if quick:
        return ways[-1]
    found: dict[Way, float] = {}
    for way in ways:
        with Side(task("peer", way), folder) as side:
            side.steps(1)
            found[way] = min(side.steps(1)[0] for _ in range(2))
        say(f"  peer's trial: {way}: {found[way]:.3f} s a step")
    return min(found, key=lambda way: found[way])


def _compare_losses(ours: Side, peer: Side, precision: str, say: Callable[[str], None]) -> None:
    (_, mine), (_, other) = ours.steps(1), peer.steps(1)
    if not abs(mine - other) < TOLERANCE[precision]:
        raise StageFailed(
            f"bench train: the first loss is {mine:.6f} here and {other:.6f} in transformers: not the same work",
            "Nothing was timed. Check the conversion of the weights.",
        )
    say(f"  first loss: ours {mine:.6f}, transformers {other:.6f}")


def report(
    case: str,
    tokens: int,
    pairs: list[tuple[float, float]],
    peer_name: str,
    say: Callable[[str], None],
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The record of one comparison from (our seconds, peer's seconds) of every round."""
    ratios = [peer / ours for ours, peer in pairs]
    record: dict[str, Any] = {
        "case": case,
        "metric": "training speed",
        "unit": "tokens/s",
        "ours": round(tokens / statistics.median(ours for ours, _ in pairs), 1),
        "peer": round(tokens / statistics.median(peer for _, peer in pairs), 1),
        "peer_name": peer_name,
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    say(f"{case}: {record['ours']:,.0f} tokens/s, {peer_name} {record['peer']:,.0f}")
    say(f"  ratio {record['ratio']:.2f} ({record['spread'][0]:.2f} to {record['spread'][1]:.2f})")
    write(record)
    return record


def parts(
    case: str,
    ours: Side,
    peer: Side,
    steps: int,
    say: Callable[[str], None],
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Where a step's time goes, rank 0 of both sides; measuring it costs a little itself."""
    mine, other = (side.ask("parts", steps)[0]["parts"] for side in (ours, peer))
    total, other_total = sum(mine.values()), sum(other.values())
    say(f"  {'where the time goes, rank 0':<38}{'ours ms':>9}{'':>6}{'peer ms':>9}")
    for name in [*sorted(mine, key=lambda key: -mine[key]), *(key for key in other if key not in mine)]:
        a, b = mine.get(name), other.get(name)
        cells = [
            f"{1e3 * x:9.1f} {x / of:4.0%} " if x is not None else " " * 15 for x, of in ((a, total), (b, other_total))
        ]
        say(f"  {name:<38}{''.join(cells)}")
        write(
            {
                "case": case,
                "metric": f"part of a step: {name}",
                "unit": "ms",
                "ours": None if a is None else round(1e3 * a, 3),
                "peer": None if b is None else round(1e3 * b, 3),
                "peer_name": "transformers",
                "ratio": round(b / a, 3) if a and b else None,
                "spread": None,
            }
        )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
