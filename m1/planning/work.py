"""What every training stage of a profile does in an optimizer step, and how much the whole run costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m1.arithmetic import forward_flops
from m1.planning.memory import Load
from m1.profile import TRAINING_STAGES, Parallel, Profile

#: NVIDIA H100/H800 SXM, dense bfloat16 (NVIDIA's data sheet).
H800_FLOPS = 989.4e12
#: MiniMax-M1 report, abstract and §3: reinforcement learning took 512 H800 three weeks and 534,700 dollars.
PAPER_RL_GPU_HOURS = 512 * 3 * 7 * 24
PAPER_RL_DOLLARS = 534_700
#: Report §6.2: on AIME and LiveCodeBench responses grow beyond 20,000 tokens on average.
PAPER_RESPONSE_TOKENS = 20_000


@dataclass(frozen=True)
class Work:
    """Optimizer steps of one kind.

    Attributes:
        name: the stage, with its number where it has several parts.
        global_batch_size: sequences of a step over all data-parallel ranks.
    """

    name: str
    stage: str
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int

    def load(self, parallel: Parallel) -> Load:
        """The part of one rank; at least one micro-batch."""
        of_rank = self.global_batch_size // (self.micro_batch_size * parallel.data_parallel_size)
        return Load(self.sequence_length, self.micro_batch_size, max(1, of_rank))


@dataclass(frozen=True)
class Price:
    """What a GPU does and costs.

    Attributes:
        peak_flops: of one GPU.
        mfu: share of the peak that training reaches, by the operations of `m1.arithmetic`, without recomputation.
        rollout_mfu: the same for generating tokens, which reads weights and caches more than it multiplies.
        dollars: of one GPU for one hour.
    """

    peak_flops: float = H800_FLOPS
    mfu: float = 0.35
    rollout_mfu: float = 0.10
    dollars: float = PAPER_RL_DOLLARS / PAPER_RL_GPU_HOURS

    def hours(self, flops: float, *, rollout: bool = False) -> float:
        """GPU hours for so many operations."""
        return flops / (self.peak_flops * (self.rollout_mfu if rollout else self.mfu)) / 3600


def training_work(profile: Profile) -> list[Work]:
    """The training stages in the profile's order; reinforcement learning at its longest window.

    An RL update is counted as if every response filled the longest window and no two shared their prompt: a bound of
    its memory and time.
    """
    found: list[Work] = []
    for stage in (stage for stage in profile.order if stage in TRAINING_STAGES):
        part: Any = profile.section(stage)
        if stage == "context-extension":
            for number, s in enumerate(part.stages, 1):
                name = f"{stage} {number}"
                found.append(Work(name, stage, s.sequence_length, s.global_batch_size, s.micro_batch_size))
        elif stage.startswith("rl-"):
            length = part.longest_prompt + max(part.windows)
            update = part.prompts_per_step * part.group_size // part.updates_per_step
            found.append(Work(stage, stage, length, update, part.micro_batch_size))
        else:
            found.append(Work(stage, stage, part.sequence_length, part.global_batch_size, part.micro_batch_size))
    return found


@dataclass(frozen=True)
class RlCost:
    """Operations of reinforcement learning at one length of the responses.

    Attributes:
        tokens: of prompts and responses, over all batches of rollouts.
        rollout_flops: generating them, one forward pass each token.
        training_flops: forward pass for the old log-probabilities, and one training pass.
    """

    tokens: float
    rollout_flops: float
    training_flops: float

    @property
    def flops(self) -> float:
        return self.rollout_flops + self.training_flops

    def hours(self, price: Price) -> float:
        return price.hours(self.rollout_flops, rollout=True) + price.hours(self.training_flops)


def rl_cost(profile: Profile, stage: str, response_tokens: float | None = None) -> RlCost:
    """Estimate of one RL stage. Every response is trained on once; attention is counted at its mean context.

    Responses that dynamic sampling throws away are not counted; the report does not say how many those were.

    Args:
        response_tokens: mean length of a response; None fills every window, the upper bound.
    """
    part: Any = profile.section(stage)
    window = sum(part.windows) / len(part.windows)
    length = part.mean_prompt_limit + (window if response_tokens is None else min(response_tokens, window))
    tokens = part.train_steps * part.prompts_per_step * part.group_size * length
    forward = forward_flops(profile.model, tokens, round(length))
    return RlCost(tokens, forward, 4 * forward)


def stage_hours(profile: Profile, stage: str, flops: float, price: Price) -> float:
    """GPU hours of a stage: evaluation generates, reinforcement learning does both, the others train."""
    if stage in ("rl-40k", "rl-80k"):
        return rl_cost(profile, stage).hours(price)
    return price.hours(flops, rollout=stage == "evaluate")
