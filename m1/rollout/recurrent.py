"""The engine that decodes in the trainer's process, on the trainer's weights: batched, reproducible row by row."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from m1.config.rl import Repetition
from m1.errors import M1Error
from m1.model.hybrid import HybridModel
from m1.rollout.decoder import Cache, Decoder
from m1.rollout.engine import Rollout, Sampling
from m1.rollout.sampling import sample
from m1.run.stop_signal import StopSignal
from m1.training.stopping import StopRequested

#: Rows decoded together; a group of responses that is larger is split.
BATCH_SIZE = 128


class RecurrentEngine:
    """Decodes with constant state in lightning layers and a cache in softmax layers; see `m1.rollout.engine`.

    Args:
        model: whole on this rank. Its weights are used as they are at every call.
        eos_id: id of the token that ends a response.
    """

    def __init__(self, model: HybridModel, eos_id: int, *, batch_size: int = BATCH_SIZE) -> None:
        self.decoder = Decoder(model)
        self.eos_id, self.batch_size = eos_id, batch_size
        self.weight_version = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        stop: StopSignal | None = None,
    ) -> list[list[Rollout]]:
        """See `RolloutEngine.generate`; the ranks of a data-parallel group have prompts of their own."""
        rollouts = generate(
            self.decoder,
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            eos_id=self.eos_id,
            seeds=seeds,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition=sampling.repetition,
            batch_size=self.batch_size,
            stop=stop,
        )
        for rollout in (rollout for group in rollouts for rollout in group):
            rollout.weight_version = self.weight_version
        return rollouts

    def update_weights(self, version: int) -> None:
        """The weights are the trainer's own, whatever they are now: the number alone changes."""
        self.weight_version = version

    def close(self) -> None:
        """Nothing is held that outlives the model."""


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
    batch_size: int = BATCH_SIZE,
    stop: StopSignal | None = None,
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


def _abandoned(stop: StopSignal | None) -> bool:
    """Whether this rank may leave off by itself: ranks that share every matrix must do equally many steps."""
    from megatron.core import parallel_state

    return stop is not None and stop.noticed() and parallel_state.get_tensor_model_parallel_world_size() == 1


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
    """Record a sampled token; whether the row has ended.

    Raises:
        M1Error: the model's logits are not finite.
    """
    rollout = row.rollout
    if not math.isfinite(logprob):
        raise M1Error(
            f"the model's logits are not finite numbers after {len(rollout.tokens)} tokens of a response",
            "Its weights have gone: look at loss and gradient norm of this run and the one it starts from.",
        )
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
