"""What every training stage of a profile does in an optimizer step, and how much the whole run costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from m1.config import layout
from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.config.profile import Profile
from m1.config.rl import Rl
from m1.planning.arithmetic import forward_flops
from m1.planning.memory import Load
from m1.run.registry import stage
from m1.run.stage import Cost, Steps

#: NVIDIA H100/H800 SXM, dense bfloat16 (NVIDIA's data sheet).
H800_FLOPS = 989.4e12
#: MiniMax-M1 report, abstract and §3: reinforcement learning took 512 H800 three weeks and 534,700 dollars.
PAPER_RL_GPU_HOURS = 512 * 3 * 7 * 24
PAPER_RL_DOLLARS = 534_700
#: Report §6.2: on AIME and LiveCodeBench responses grow beyond 20,000 tokens on average.
PAPER_RESPONSE_TOKENS = 20_000


@dataclass(frozen=True)
class Price:
    """What a GPU does and costs.

    Attributes:
        peak_flops: of one GPU.
        mfu: share of the peak that training reaches, by the operations of `m1.planning.arithmetic`, no recomputation.
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

    def of(self, cost: Cost) -> float:
        """GPU hours of a stage's expected work."""
        return self.hours(cost.rollout_flops, rollout=True) + self.hours(cost.training_flops)


def load(steps: Steps, parallel: Parallel) -> Load:
    """The part of one rank in optimizer steps; at least one micro-batch."""
    of_rank = steps.global_batch_size // (steps.micro_batch_size * parallel.data_parallel_size)
    return Load(steps.sequence_length, steps.micro_batch_size, max(1, of_rank))


def training_steps(profile: Profile) -> list[Steps]:
    """The optimizer steps of all training stages, in the profile's order."""
    return [steps for name in profile.order for steps in stage(name).steps(profile)]


def layout_rules(profile: Profile, steps: Iterable[Steps]) -> Iterator[str]:
    """Which rules of the profile's layout these steps break."""
    for each in steps:
        broken = layout.sequence_rules(profile.parallel, each.sequence_length)
        broken += layout.batch_rules(profile.parallel, each.global_batch_size, each.micro_batch_size)
        yield from (f"{each.name}: {rule}" for rule in broken)


def rl_cost(model: Model, part: Rl, response_tokens: float | None = None) -> Cost:
    """Estimate of one RL stage. Every response is trained on once; attention is counted at its mean context.

    Generating takes one forward pass a token; training one for the old log-probabilities, and a forward and a backward
    pass. Responses that dynamic sampling throws away are not counted; the report does not say how many those were.

    Args:
        response_tokens: mean length of a response; None fills every window, the upper bound.
    """
    window = sum(part.windows) / len(part.windows)
    length = part.mean_prompt_limit + (window if response_tokens is None else min(response_tokens, window))
    tokens = part.train_steps * part.prompts_per_step * part.group_size * length
    forward = forward_flops(model, tokens, round(length))
    return Cost(int(tokens), 4 * forward, forward, bound=True, steps=part.train_steps)
