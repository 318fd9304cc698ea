"""Responses of the present policy, judged; and what is written down of them."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from m1.errors import ServiceError
from m1.generation import gather_shares, generate, row_seed, share_of_rank
from m1.model.decoder import Decoder
from m1.profile import Rewards, Rl
from m1.tokenizer import Tokenizer
from m1.training.stopping import StopRequest
from stages.evaluate.prompts import Prompt
from stages.rl.objectives import percentile
from stages.rl.rewards import judge, judge_verdict
from stages.rl.sampling import Group, SampledBatch

if TYPE_CHECKING:
    from stages.evaluate.swe import Judge


class RolloutWorker:
    """Generates and judges groups of responses; the data-parallel ranks share the prompts.

    Args:
        seed: with the position of a prompt and the index in its group it fixes a response's random numbers.
        stop: once it is requested, rollouts are abandoned.
        sandbox: judge of software-engineering answers, where there are any.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        section: Rl,
        seed: str,
        stop: StopRequest,
        sandbox: Judge | None = None,
    ) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.section = section
        self.seed = seed
        self.stop = stop
        self.sandbox = sandbox

    def roll_out(self, prompts: Sequence[tuple[int, Prompt]], window: int, group_size: int) -> list[Group]:
        """One group per (position, prompt), in that order, the same on every rank.

        Args:
            window: output limit in tokens.

        Raises:
            StopRequested: on every rank.
        """
        mine = share_of_rank(prompts)
        groups: dict[int, Group] = {}
        # Software-engineering prompts are many times as long, and a batch is as wide as its longest: they go apart.
        for swe in (False, True) if self.sandbox is not None else (False,):
            part = [(position, prompt) for position, prompt in mine if prompt.swe == swe]
            rollouts = generate(
                self.decoder,
                [prompt.tokens for _, prompt in part],
                max_new_tokens=window,
                eos_id=self.tokenizer.eos_id,
                seeds=[[row_seed(self.seed, position, i) for i in range(group_size)] for position, _ in part],
                repetition=self.section.repetition,
                stop=self.stop,
            )
            for (position, prompt), responses in zip(part, rollouts, strict=True):
                texts = [self.tokenizer.decode(response.tokens) for response in responses]
                groups[position] = Group(position, prompt, responses, texts, [])
        made = [groups[position] for position, _ in mine]
        for group in made:
            if not group.prompt.swe:
                group.rewards = [
                    judge(group.prompt.row, text, len(response.tokens), window=window, weights=self.section.rewards)
                    for text, response in zip(group.texts, group.rollouts, strict=True)
                ]
        if self.sandbox is not None:
            reward_swe(self.sandbox, [g for g in made if g.prompt.swe], window, self.section.rewards, self.stop)
        return gather_shares(made, len(prompts))


def reward_swe(
    sandbox: Judge, groups: Sequence[Group], window: int, weights: Rewards, stop: StopRequest | None = None
) -> None:
    """Fill in the rewards of software-engineering groups; a response that the sandbox failed on leaves its group.

    Raises:
        StopRequested: on every rank.
    """
    verdicts = iter(sandbox.judge([(group.prompt.row, text) for group in groups for text in group.texts], stop))
    for group in groups:
        found = [next(verdicts) for _ in group.texts]
        kept = [i for i, verdict in enumerate(found) if verdict.judged]
        group.unjudged = [verdict.message for verdict in found if not verdict.judged]
        group.rollouts = [group.rollouts[i] for i in kept]
        group.texts = [group.texts[i] for i in kept]
        group.rewards = [
            judge_verdict(found[i], len(rollout.tokens), window=window, weights=weights)
            for i, rollout in zip(kept, group.rollouts, strict=True)
        ]


def rollout_metrics(batch: SampledBatch) -> dict[str, float]:
    """Means over all responses generated in a step and judged, dropped groups included.

    Raises:
        ServiceError: none was judged.
    """
    rewards = [reward for group in batch.generated for reward in group.rewards]
    rollouts = [rollout for group in batch.generated for rollout in group.rollouts]
    if not rollouts:
        raise ServiceError(
            f"the sandbox failed on every answer: {batch.generated[0].unjudged[0]}",
            "Look at `m1 sandbox check`, then run it again: it goes on from the last checkpoint.",
        )
    lengths = torch.tensor([float(len(rollout.tokens)) for rollout in rollouts])
    tokens = float(lengths.sum())
    entropy = -sum(sum(rollout.logprobs) for rollout in rollouts) / tokens
    count, groups = len(rollouts), len(batch.generated)
    judged = [group for group in batch.generated if group.rewards]
    solved = sum(all(reward.correct for reward in group.rewards) for group in judged)
    failed = sum(not any(reward.correct for reward in group.rewards) for group in judged)
    return {
        "rl/reward": sum(reward.total for reward in rewards) / count,
        "rl/correct": sum(reward.correct for reward in rewards) / count,
        "rl/format": sum(reward.formatted for reward in rewards) / count,
        "rl/overlong_penalty": sum(reward.overlong for reward in rewards) / count,
        "rl/response_length": tokens / count,
        "rl/response_length_p99": float(percentile(lengths, 0.99)),
        "rl/truncated": sum(rollout.finish_reason == "length" for rollout in rollouts) / count,
        "rl/repetition_stopped": sum(rollout.finish_reason == "repetition" for rollout in rollouts) / count,
        "rl/entropy": entropy,
        "rl/perplexity": math.exp(entropy),
        "rl/groups_dropped": float(groups - len(batch.groups)),
        "rl/groups_all_correct": solved / len(judged),
        "rl/groups_none_correct": failed / len(judged),
        "rl/generation_rounds": float(batch.rounds),
        "rl/generated_tokens": tokens,
        "rl/tokens": tokens + sum(len(group.prompt.tokens) * len(group.rollouts) for group in batch.generated),
    }


def swe_metrics(batch: SampledBatch) -> dict[str, float]:
    """Resolved rate of the judged answers, in all and by kind, how often each end came, and answers not judged."""
    from stages.evaluate.swe import ENDS

    groups = [group for group in batch.generated if group.prompt.swe]
    ends = Counter(reward.end for group in groups for reward in group.rewards)
    unjudged = sum(len(group.unjudged) for group in groups)
    by_kind: dict[str, list[bool]] = {}
    for group in groups:
        for name in ("swe/resolved", f"swe/resolved/{group.prompt.task.removeprefix('swe-')}"):
            by_kind.setdefault(name, []).extend(reward.correct for reward in group.rewards)
    return {
        "swe/responses": float(ends.total() + unjudged),
        "swe/unjudged": float(unjudged),
        **{name: sum(correct) / len(correct) for name, correct in sorted(by_kind.items()) if correct},
        **{f"swe/end/{end}": float(ends[end]) for end in ENDS},
    }


def write_rollouts(file: Path, batch: SampledBatch) -> None:
    """One JSON object per response of a step, for reading; groups in the order they were generated."""
    kept = {group.position for group in batch.groups}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    with open(unfinished, "w") as out:
        for group in batch.generated:
            for rollout, text, reward, advantage in zip(
                group.rollouts, group.texts, group.rewards, group.advantages, strict=True
            ):
                line = {
                    "task": group.prompt.task,
                    "id": group.prompt.row["id"],
                    "trained_on": group.position in kept,
                    "prompt": group.prompt.row["question"],
                    "expected": group.prompt.row["answer"],
                    "response": text,
                    "tokens": len(rollout.tokens),
                    "finish_reason": rollout.finish_reason,
                    "correct": reward.correct,
                    "formatted": reward.formatted,
                    **({"end": reward.end} if reward.end else {}),
                    "reward": round(reward.total, 4),
                    "advantage": round(advantage, 4),
                }
                out.write(json.dumps(line) + "\n")
    os.replace(unfinished, file)
