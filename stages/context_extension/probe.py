"""What is measured after every extension stage: retrieval by depth and held-out loss by position."""

from __future__ import annotations

from typing import Any

import numpy
import torch
import torch.distributed

from m1.config.context_extension import ContextExtension
from m1.run.contract import StageContext
from m1.training import parallel
from m1.training.batch import full_batch
from m1.training.data import TokenStream, share
from m1.training.retrieval import Retrieval
from m1.training.trainer import Trainer

Context = StageContext[ContextExtension]
POSITION_BINS = 16
HELD_OUT_TOKENS = 65_536


def measure(context: Context, trainer: Trainer, retrieval: Retrieval, length: int) -> dict[str, Any]:
    """Probe the model at one length; the same questions and texts for the same profile seed.

    Returns:
        length, rotary_base, retrieval (share of probes with every value token right), by_depth (five accuracies from
        the beginning to the end of the window), positions and loss_by_position, and `metrics` for the log.
    """
    correct = _retrieval(context, trainer, retrieval, length)
    losses = _loss_by_position(context, trainer, length)
    by_depth = [float(part.mean()) for part in numpy.array_split(correct, 5)]
    edges = numpy.linspace(0, length, len(losses) + 1)
    metrics = {f"retrieval/{length}": float(correct.mean()), f"heldout/loss_{length}": float(numpy.mean(losses))}
    return {
        "length": length,
        "rotary_base": trainer.model.rotary_base,
        "retrieval": float(correct.mean()),
        "by_depth": by_depth,
        "positions": ((edges[1:] + edges[:-1]) / 2).tolist(),
        "loss_by_position": losses,
        "metrics": metrics,
    }


def _retrieval(context: Context, trainer: Trainer, retrieval: Retrieval, length: int) -> numpy.ndarray:
    """1.0 or 0.0 per probe, ordered by the depth of its fact; ranks share the probes."""
    count = context.section.probes
    stream = TokenStream(context.data["tokens"] / "heldout", length, 1)
    correct = torch.zeros(count, device=torch.cuda.current_device())
    for index, counts in _shares(count):
        random = numpy.random.default_rng([context.profile.seed, length, index])
        question = retrieval.build(stream.sequence(index), 1, random, depth=index / max(1, count - 1))
        hits = trainer.predicts_labels(full_batch(question.tokens[None]))[0]
        if counts:
            correct[index] = hits[[at - 1 for at in question.answers]].prod()
    torch.distributed.all_reduce(correct, group=_group())
    return correct.cpu().numpy()


def _shares(count: int) -> list[tuple[int, bool]]:
    """What this data-parallel rank measures of `count` things, and whether that counts.

    Every rank measures equally many, since ranks that hold experts for one another work in step.
    """
    rank, ranks = parallel.data_parallel_rank(), parallel.data_parallel_size()
    return [(i % count, i < count) for i in share(list(range(-(-count // ranks) * ranks)), rank, ranks)]


def _loss_by_position(context: Context, trainer: Trainer, length: int) -> list[float]:
    """Mean held-out loss (nats) in equal bins of positions."""
    stream = TokenStream(context.data["tokens"] / "heldout", length, 0)
    count = min(stream.num_sequences, max(parallel.data_parallel_size(), HELD_OUT_TOKENS // length))
    bins = min(POSITION_BINS, length)
    sums = torch.zeros(bins, device=torch.cuda.current_device())
    for index, counts in _shares(count):
        logprobs = trainer.token_logprobs(full_batch(stream.in_order(index)[None]))[0]
        if counts:
            sums -= torch.stack([part.mean() for part in logprobs.tensor_split(bins)])
    torch.distributed.all_reduce(sums, group=_group())
    return (sums / count).tolist()


def _group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group()
