"""Responses to prompts, judged, and what they say of a policy: pass@1 as the mean over samples, by task.

Shared by the evaluate stage and the periodic checks during reinforcement learning.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from m1.rollout.engine import Rollout, RolloutEngine, Sampling, row_seed
from m1.run.stop_signal import StopSignal
from m1.tasks.asking import Pool
from m1.tasks.base import Row, Verdict
from m1.tasks.prompts import Prompt
from m1.tokenizer import Tokenizer
from m1.training.parallel import gather_shares, share_of_rank

#: Name of the row for all tasks together.
MEAN = "mean"


@dataclass(frozen=True)
class Answered:
    """A prompt with its sampled responses."""

    row: Row
    texts: list[str]
    rollouts: list[Rollout]
    verdicts: list[Verdict]

    @property
    def judged(self) -> list[Verdict]:
        """Without those of a judge that failed."""
        return [verdict for verdict in self.verdicts if verdict.judged]

    @property
    def tokens(self) -> int:
        """Generated tokens."""
        return sum(len(rollout.tokens) for rollout in self.rollouts)


@dataclass(frozen=True)
class Accuracy:
    """pass@1 of one task: the mean over prompts of the share of judged responses that are right.

    The standard error is that of the prompts drawn: the samples of one prompt are not independent, so prompts are the
    unit.

    Attributes:
        value: None where nothing was judged.
        reward: the same mean of the verdicts' values, which may count a partial success.
        prompts: with at least one judged response.
        ends: how often each end came, most frequent first.
        unjudged: responses on which the judge failed.
    """

    value: float | None
    standard_error: float
    prompts: int
    reward: float | None = None
    ends: tuple[tuple[str, int], ...] = ()
    unjudged: int = 0

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval by the normal approximation, within [0, 1]."""
        if self.value is None:
            return None
        half = 1.96 * self.standard_error
        return max(0.0, self.value - half), min(1.0, self.value + half)


def evaluate_prompts(
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    pool: Pool,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    samples: int,
    seed: str,
    stop: StopSignal | None = None,
) -> list[Answered]:
    """Sample and judge responses; the data-parallel ranks share the prompts and all return all of them, in order.

    Args:
        prompts: of the pool.
        samples: responses per prompt.
        seed: together with a prompt's id and the sample's index it fixes the random numbers of a response, so that
            checkpoints are compared on the same draws.
        stop: once it is requested, the evaluation is abandoned.

    Raises:
        StopRequested: on every rank.
    """
    mine = share_of_rank(prompts)
    seeds = [[row_seed(seed, prompt.row.id, i) for i in range(samples)] for prompt in mine]
    responses = engine.generate([prompt.tokens for prompt in mine], seeds, sampling, stop)
    texts = [[tokenizer.decode_chat(rollout.tokens) for rollout in rollouts] for rollouts in responses]
    asked = [(prompt.row, text) for prompt, group in zip(mine, texts, strict=True) for text in group]
    verdicts = iter(pool.judge.judge(asked, stop))
    answered = [
        Answered(prompt.row, group, rollouts, [next(verdicts) for _ in group])
        for prompt, group, rollouts in zip(mine, texts, responses, strict=True)
    ]
    return gather_shares(answered, len(prompts))


def accuracy_by_task(answered: Sequence[Answered]) -> dict[str, Accuracy]:
    """pass@1 of every task in alphabetical order, then `MEAN`: the unweighted mean over tasks."""
    by_task: dict[str, list[Answered]] = {}
    for item in answered:
        by_task.setdefault(item.row.task, []).append(item)
    table = {task: _accuracy(by_task[task]) for task in sorted(by_task)}
    table[MEAN] = _mean(list(table.values()))
    return table


def _accuracy(items: Sequence[Answered]) -> Accuracy:
    judged = [item.judged for item in items if item.judged]
    rates = [sum(verdict.correct for verdict in verdicts) / len(verdicts) for verdicts in judged]
    rewards = [sum(verdict.value for verdict in verdicts) / len(verdicts) for verdicts in judged]
    ends = Counter(verdict.end for verdicts in judged for verdict in verdicts if verdict.end)
    value = sum(rates) / len(rates) if rates else None
    variance = sum((rate - (value or 0.0)) ** 2 for rate in rates) / max(1, len(rates) - 1)
    return Accuracy(
        value=value,
        standard_error=math.sqrt(variance / len(rates)) if rates else 0.0,
        prompts=len(rates),
        reward=sum(rewards) / len(rewards) if rewards else None,
        ends=tuple(ends.most_common()),
        unjudged=sum(len(item.verdicts) - len(item.judged) for item in items),
    )


def _mean(tasks: Sequence[Accuracy]) -> Accuracy:
    """The unweighted mean over the tasks of which something was judged."""
    known = [task for task in tasks if task.value is not None]
    ends: Counter[str] = Counter()
    for task in tasks:
        ends.update(dict(task.ends))
    count = max(1, len(known))
    return Accuracy(
        value=sum(task.value or 0.0 for task in known) / count if known else None,
        standard_error=math.sqrt(sum(task.standard_error**2 for task in known)) / count,
        prompts=sum(task.prompts for task in tasks),
        reward=sum(task.reward or 0.0 for task in known) / count if known else None,
        ends=tuple(ends.most_common()),
        unjudged=sum(task.unjudged for task in tasks),
    )
