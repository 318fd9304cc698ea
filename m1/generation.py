"""Sampling of responses from the decoder, batched, reproducible row by row."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
import torch.distributed
from torch import Tensor

from m1.model.decoder import Cache, Decoder
from m1.profile import Repetition
from m1.training.stopping import StopRequest, StopRequested

#: A nucleus is looked for among this many most probable tokens before the whole vocabulary is sorted.
_NUCLEUS_GUESS = 64


T = TypeVar("T")


@dataclass
class Rollout:
    """One sampled response.

    Attributes:
        tokens: sampled ids, the end token included when it was sampled.
        logprobs: log-probability of each sampled token under softmax(logits): temperature 1, nothing cut off. With
            temperature 1 and top_p 1 this is the distribution the token was drawn from.
        finish_reason: "stop" (end token), "length" (limit reached), or "repetition" (stopped early).
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "repetition"] = "length"


class _Row:
    """A response in progress: where its result goes, its random numbers, its run of near-certain tokens."""

    def __init__(self, seed: int, rollout: Rollout) -> None:
        self.rollout = rollout
        self.certain = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: list[float] = []

    def uniform(self) -> float:
        """The row's next uniform number in [0, 1)."""
        if not self._drawn:
            self._drawn = torch.rand(256, generator=self._generator).tolist()
        return self._drawn.pop()


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    seeds: Sequence[Sequence[int]],
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition: Repetition | None = None,
    batch_size: int = 128,
    stop: StopRequest | None = None,
) -> list[list[Rollout]]:
    """Sample responses: as many to each prompt as it has seeds.

    Every prompt is read once and its state copied to its responses. Rows that end leave the batch and make room for
    the next prompts. The random numbers of a row come from its own seed alone, so the result does not depend on
    which rows share its batch, up to float rounding of the logits.

    Args:
        prompts: token ids, none empty.
        max_new_tokens: the output window.
        seeds: per prompt one integer per wanted response; see `row_seed`.
        temperature, top_p: the sampling distribution: softmax(logits / temperature) cut to its nucleus.
        repetition: stop a row after this many consecutive tokens that each had a probability (at temperature 1)
            above the threshold (MiniMax-M1 report §3.2).
        batch_size: rows decoded together; a group larger than this is split.
        stop: once any rank has been asked to stop, all of them abandon what they generate; all ranks take part.

    Returns:
        Per prompt its rollouts, in the order of its seeds.

    Raises:
        StopRequested: on every rank.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    results = [[Rollout() for _ in group] for group in seeds]
    waiting = deque(
        (prompt, list(zip(group, rollouts, strict=True)))
        for prompt, group, rollouts in zip(prompts, seeds, results, strict=True)
        if group
    )
    capacity = max(map(len, prompts), default=0) + max_new_tokens
    rows: list[_Row] = []
    cache: Cache | None = None
    logits: Tensor | None = None
    while (rows or waiting) and not _abandoned(stop):
        # Joining two caches copies them, so room is made for several prompts before the next are read.
        if waiting and len(rows) <= 0.75 * batch_size:
            new = _take(waiting, batch_size - len(rows))
            new_cache, new_logits = _prefill(decoder, new, capacity)
            rows += [_Row(seed, rollout) for _, members in new for seed, rollout in members]
            cache = new_cache if cache is None else cache.append(new_cache)
            logits = new_logits if logits is None else torch.cat((logits, new_logits))
        assert cache is not None and logits is not None
        uniforms = torch.tensor([row.uniform() for row in rows])
        tokens, logprobs = sample(logits, uniforms.to(logits.device), temperature=temperature, top_p=top_p)
        running = []
        for i, (row, token, logprob) in enumerate(zip(rows, tokens.tolist(), logprobs.tolist(), strict=True)):
            if not _advance(row, token, logprob, eos_id, max_new_tokens, repetition):
                running.append(i)
        if not running:
            rows, cache, logits = [], None, None
            continue
        if len(running) < len(rows):
            order = cache.keep(running)
            rows, tokens = [rows[i] for i in order], tokens[order]
        logits = decoder.step(cache, tokens)
    if stop is not None and stop.agreed():
        raise StopRequested
    return results


def _abandoned(stop: StopRequest | None) -> bool:
    """Whether this rank may leave off by itself: ranks that share every matrix must do equally many steps."""
    from megatron.core import parallel_state

    return stop is not None and stop.noticed() and parallel_state.get_tensor_model_parallel_world_size() == 1


def row_seed(*parts: int | str) -> int:
    """A 63-bit seed from any identifying values, for example (run seed, step, prompt id, sample index)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.inference_mode()
def sample(logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at the given uniform numbers.

    The nucleus of top_p is the smallest set of most probable tokens whose probabilities (at this temperature) sum to
    at least top_p; its probabilities are renormalised.

    Args:
        logits: float32 (batch, vocabulary).
        uniforms: float32 (batch,) in [0, 1).

    Returns:
        int64 tokens (batch,) and their float32 log-probabilities under softmax(logits).
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    scaled = logprobs if temperature == 1.0 else torch.log_softmax(logits / temperature, dim=-1)
    if top_p < 1.0:
        values, order = nucleus(scaled.exp(), top_p)
        tokens = order.gather(1, _invert(values, uniforms)[:, None])[:, 0]
    else:
        tokens = _invert(scaled.exp(), uniforms)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The nucleus in falling order of probability: values (batch, n), zero outside it, and token ids (batch, n)."""
    guess = min(_NUCLEUS_GUESS, probabilities.shape[1])
    values, order = probabilities.topk(guess, dim=-1)
    if guess < probabilities.shape[1] and bool((values.sum(-1) < top_p).any()):
        values, order = probabilities.sort(dim=-1, descending=True)
    before = values.cumsum(-1) - values
    return values.masked_fill(before >= top_p, 0.0), order


def _invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Index of the first cumulative sum above uniform x total; never an entry of probability zero."""
    cumulative = probabilities.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    # Rounding may put the target at the total itself: step back to the last entry that has any mass.
    target = torch.minimum(target, torch.nextafter(cumulative[:, -1:], torch.zeros_like(target)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _take(
    waiting: deque[tuple[Sequence[int], list[tuple[int, Rollout]]]], room: int
) -> list[tuple[Sequence[int], list[tuple[int, Rollout]]]]:
    """Prompts with their members, `room` responses in all at most; a group that does not fit is split."""
    taken = []
    while waiting and room:
        prompt, members = waiting.popleft()
        if len(members) > room:
            waiting.appendleft((prompt, members[room:]))
            members = members[:room]
        taken.append((prompt, members))
        room -= len(members)
    return taken


def _prefill(
    decoder: Decoder, groups: list[tuple[Sequence[int], list[tuple[int, Rollout]]]], capacity: int
) -> tuple[Cache, Tensor]:
    """Read each prompt once and copy its state and logits to all its responses."""
    device = decoder.model.output_layer.weight.device
    lengths = torch.tensor([len(prompt) for prompt, _ in groups], device=device)
    tokens = torch.zeros(len(groups), int(lengths.max()), dtype=torch.long, device=device)
    for i, (prompt, _) in enumerate(groups):
        tokens[i, : len(prompt)] = torch.tensor(prompt, device=device)
    cache, logits = decoder.prefill(tokens, lengths, capacity)
    copies = torch.tensor([len(members) for _, members in groups], device=device)
    rows = torch.arange(len(groups), device=device).repeat_interleave(copies)
    return cache.select(rows), logits[rows]


def _advance(
    row: _Row, token: int, logprob: float, eos_id: int, max_new_tokens: int, repetition: Repetition | None
) -> bool:
    """Record a sampled token; whether the row has ended."""
    rollout = row.rollout
    rollout.tokens.append(token)
    rollout.logprobs.append(logprob)
    if token == eos_id:
        rollout.finish_reason = "stop"
        return True
    if repetition is not None:
        certain = logprob > math.log(repetition.probability)
        row.certain = row.certain + 1 if certain else 0
        if row.certain >= repetition.consecutive_tokens:
            rollout.finish_reason = "repetition"
            return True
    return len(rollout.tokens) >= max_new_tokens


def share_of_rank(items: Sequence[T]) -> list[T]:
    """The items this data-parallel rank works on; `gather_shares` puts the results back in order."""
    from megatron.core import parallel_state

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return list(items[rank::size])


def gather_shares(mine: list[T], total: int) -> list[T]:
    """Every rank's results, in the order of the items that `share_of_rank` split; the same list on every rank."""
    from megatron.core import parallel_state

    shares: list[list[T]] = [[] for _ in range(parallel_state.get_data_parallel_world_size())]
    torch.distributed.all_gather_object(shares, mine, group=parallel_state.get_data_parallel_group())
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]
