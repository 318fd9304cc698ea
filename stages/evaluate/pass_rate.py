"""pass@1 as the mean over samples, shared by the evaluate stage and the periodic checks during RL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from m1.generation import Rollout, gather_shares, generate, row_seed, share_of_rank
from m1.model.decoder import Decoder
from m1.tokenizer import Tokenizer
from m1.training.stopping import StopRequest
from stages.evaluate.prompts import Prompt
from stages.synthesize.rewards import score


@dataclass
class Answered:
    """A prompt with its sampled responses."""

    row: dict[str, Any]
    texts: list[str]
    rollouts: list[Rollout]
    correct: list[bool]

    @property
    def pass_rate(self) -> float:
        return sum(self.correct) / len(self.correct)


@dataclass(frozen=True)
class Accuracy:
    """Mean pass@1 and its standard error.

    The error is that of the prompts drawn: the samples of one prompt are not independent, so prompts are the unit.
    """

    value: float
    standard_error: float
    prompts: int

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval by the normal approximation, within [0, 1]."""
        half = 1.96 * self.standard_error
        return max(0.0, self.value - half), min(1.0, self.value + half)


def sample(
    decoder: Decoder, tokenizer: Tokenizer, prompts: Sequence[Prompt], samples: int, seed: str, **how: Any
) -> list[list[Rollout]]:
    """`samples` responses to each prompt; their random numbers follow from the seed, the prompt's id and the index.

    Args:
        how: max_new_tokens, temperature, top_p, stop of `generate`.
    """
    seeds = [[row_seed(seed, prompt.row["id"], i) for i in range(samples)] for prompt in prompts]
    return generate(decoder, [prompt.tokens for prompt in prompts], eos_id=tokenizer.eos_id, seeds=seeds, **how)


def evaluate_prompts(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: str,
    stop: StopRequest | None = None,
) -> list[Answered]:
    """Sample and score responses; the data-parallel ranks share the prompts and all return all of them, in order.

    Args:
        samples: responses per prompt.
        seed: together with a prompt's id and the sample's index it fixes the random numbers of a response, so that
            checkpoints are compared on the same draws.
        stop: once it is requested, the evaluation is abandoned.

    Raises:
        StopRequested: on every rank.
    """
    mine = share_of_rank(prompts)
    responses = sample(
        decoder, tokenizer, mine, samples, seed,
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop,
    )  # fmt: skip
    answered = []
    for prompt, rollouts in zip(mine, responses, strict=True):
        texts = [tokenizer.decode(rollout.tokens) for rollout in rollouts]
        answered.append(Answered(prompt.row, texts, rollouts, [score(prompt.row, text).correct for text in texts]))
    return gather_shares(answered, len(prompts))


def accuracy_by_task(answered: Sequence[Answered]) -> dict[str, Accuracy]:
    """pass@1 of every task in alphabetical order, then "mean": the unweighted mean over tasks."""
    rates: dict[str, list[float]] = {}
    for item in answered:
        rates.setdefault(item.row["task"], []).append(item.pass_rate)
    table = {}
    for task in sorted(rates):
        values = rates[task]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
        table[task] = Accuracy(mean, math.sqrt(variance / len(values)), len(values))
    tasks = list(table.values())
    table["mean"] = Accuracy(
        sum(t.value for t in tasks) / len(tasks),
        math.sqrt(sum(t.standard_error**2 for t in tasks)) / len(tasks),
        sum(t.prompts for t in tasks),
    )
    return table
