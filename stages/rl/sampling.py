"""Which prompts are rolled out: an order that a single integer resumes, and dynamic sampling."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from m1.config.rl import Rl
from m1.rollout.engine import Rollout
from m1.tasks.prompts import Prompt
from stages.rl.advantage import group_advantages
from stages.rl.rewards import Reward


@dataclass
class Group:
    """All responses to one prompt.

    Attributes:
        position: place in the sampler's order; no two groups of a run share it.
        texts: the decoded responses.
        unjudged: for every response that was left out because the judge failed on it, the reason.
        advantages: one per response, filled in by dynamic sampling.
    """

    position: int
    prompt: Prompt
    rollouts: list[Rollout]
    texts: list[str]
    rewards: list[Reward]
    advantages: list[float] = field(default_factory=list)
    unjudged: list[str] = field(default_factory=list)


class PromptSampler:
    """Endless shuffled passes over the prompts. The prompt at a position is a function of seed and position alone."""

    def __init__(self, prompts: Sequence[Prompt], seed: str, cursor: int = 0) -> None:
        self.prompts = prompts
        self.seed = seed
        #: Position of the next prompt; all that needs saving.
        self.cursor = cursor
        self._pass = -1
        self._order: list[int] = []

    def at(self, position: int) -> Prompt:
        number, place = divmod(position, len(self.prompts))
        if number != self._pass:
            self._pass, self._order = number, list(range(len(self.prompts)))
            random.Random(f"{self.seed}/prompts/{number}").shuffle(self._order)
        return self.prompts[self._order[place]]

    def take(self, count: int) -> list[tuple[int, Prompt]]:
        """The next prompts with their positions."""
        taken = [(position, self.at(position)) for position in range(self.cursor, self.cursor + count)]
        self.cursor += count
        return taken


class MixedSampler:
    """Several samplers in one order, each with its share of the positions.

    The first sampler takes what the others leave. Of the first n positions, n x share (rounded down) are another
    sampler's, or one fewer where two of them would have had the same. The prompt at a position depends on the samplers'
    seeds, the shares and the position alone.
    """

    def __init__(self, samplers: Sequence[PromptSampler], shares: Sequence[float], cursor: int = 0) -> None:
        assert len(samplers) == len(shares)
        self.samplers = samplers
        self.cursor = 0
        self._shares = [Fraction(share).limit_denominator(1000) for share in shares]
        self._due = [Fraction(0) for _ in samplers]
        self._taken = [0 for _ in samplers]
        for _ in range(cursor):
            self._next()

    def take(self, count: int) -> list[tuple[int, Prompt]]:
        """The next prompts with their positions, sampler by sampler: ranks that share them out in turn have equally
        many of each."""
        taken: list[list[tuple[int, Prompt]]] = [[] for _ in self.samplers]
        for _ in range(count):
            position = self.cursor
            number, place = self._next()
            taken[number].append((position, self.samplers[number].at(place)))
        return [each for part in taken for each in part]

    def _next(self) -> tuple[int, int]:
        """Which sampler has the next position, and its place in that sampler's own order."""
        self._due = [due + share for due, share in zip(self._due, self._shares)]
        waiting = [number for number in range(1, len(self.samplers)) if self._due[number] >= 1]
        number = max(waiting, key=lambda each: (self._due[each], -each), default=0)
        place = self._taken[number]
        self._due[number] -= 1
        self._taken[number] += 1
        self.cursor += 1
        return number, place


@dataclass
class SampledBatch:
    """Result of dynamic sampling.

    Attributes:
        groups: with variance in their rewards, at most prompts_per_step.
        generated: every group rolled out, kept or not.
        rounds: rounds of generation used.
    """

    groups: list[Group]
    generated: list[Group]
    rounds: int


def dynamic_sampling(
    sampler: PromptSampler | MixedSampler,
    roll_out: Callable[[list[tuple[int, Prompt]]], list[Group]],
    section: Rl,
    multiple: int = 1,
) -> SampledBatch:
    """Roll out prompts until prompts_per_step groups have variance (DAPO, arXiv 2503.14476, §3.2).

    A round asks for as many prompts as are still missing, divided by the share of groups kept so far. After
    max_generation_rounds the batch is taken as it is, smaller.

    Args:
        roll_out: positions and prompts -> their groups, in order, rewards filled in.
        multiple: rounds are rounded up to this (the data-parallel size).
    """
    kept: list[Group] = []
    generated: list[Group] = []
    rounds = 0
    while len(kept) < section.prompts_per_step and rounds < section.max_generation_rounds:
        missing = section.prompts_per_step - len(kept)
        share = max(len(kept), 1) / len(generated) if generated else 1.0
        count = min(section.prompts_per_step, math.ceil(missing / share))
        groups = roll_out(sampler.take(-(-count // multiple) * multiple))
        generated += groups
        kept += [group for group in groups if _varies(group)]
        rounds += 1
    return SampledBatch(kept[: section.prompts_per_step], generated, rounds)


def _varies(group: Group) -> bool:
    """Fill in the advantages of the responses that were judged; whether there is anything in them."""
    if not group.rewards:
        return False
    advantages, varied = group_advantages(torch.tensor([[reward.total for reward in group.rewards]]).double())
    group.advantages = advantages[0].tolist()
    return bool(varied[0])
