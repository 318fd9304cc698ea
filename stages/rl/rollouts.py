"""Responses of the present policy, judged; and what is written down of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from m1.config.rl import Rewards, Rl
from m1.errors import ServiceError
from m1.files import write_rows
from m1.rollout.engine import RolloutEngine, Sampling, row_seed
from m1.run.stop_signal import StopSignal
from m1.tasks.asking import Pool
from m1.tasks.base import Verdict
from m1.tasks.prompts import Prompt
from m1.tokenizer import Tokenizer
from m1.training.parallel import gather_shares, share_of_rank
from stages.rl.objectives import percentile
from stages.rl.rewards import reward
from stages.rl.sampling import Group, SampledBatch


class RolloutWorker:
    """Generates and judges groups of responses; the data-parallel ranks share the prompts.

    Args:
        pools: prompts and judge of every family.
        seed: with the position of a prompt and the index in its group it fixes a response's random numbers.
        stop: once it is requested, rollouts are abandoned.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: Tokenizer,
        pools: Mapping[str, Pool],
        section: Rl,
        seed: str,
        stop: StopSignal,
    ) -> None:
        self.engine, self.tokenizer, self.pools = engine, tokenizer, pools
        self.section, self.seed, self.stop = section, seed, stop

    def roll_out(self, prompts: Sequence[tuple[int, Prompt]], window: int, group_size: int) -> list[Group]:
        """One group per (position, prompt), in that order, the same on every rank.

        Args:
            window: output limit in tokens.

        Raises:
            StopRequested: on every rank.
        """
        mine = share_of_rank(prompts)
        groups: dict[int, Group] = {}
        # Prompts of one family may be many times as long as another's, and a batch is as wide as its longest.
        for pool in self.pools.values():
            part = [(position, prompt) for position, prompt in mine if prompt.row.family == pool.family]
            for group in self._of_family(pool, part, window, group_size):
                groups[group.position] = group
        return gather_shares([groups[position] for position, _ in mine], len(prompts))

    def _of_family(
        self, pool: Pool, prompts: Sequence[tuple[int, Prompt]], window: int, group_size: int
    ) -> list[Group]:
        seeds = [[row_seed(self.seed, position, i) for i in range(group_size)] for position, _ in prompts]
        sampling = Sampling(window, repetition=self.section.repetition)
        rollouts = self.engine.generate([prompt.tokens for _, prompt in prompts], seeds, sampling, self.stop)
        groups = [
            Group(position, prompt, responses, [self.tokenizer.decode_chat(each.tokens) for each in responses], [])
            for (position, prompt), responses in zip(prompts, rollouts, strict=True)
        ]
        asked = [(group.prompt.row, text) for group in groups for text in group.texts]
        verdicts = iter(pool.judge.judge(asked, self.stop))
        for group in groups:
            give_rewards(group, [next(verdicts) for _ in group.texts], window, self.section.rewards)
        return groups


def give_rewards(group: Group, verdicts: Sequence[Verdict], window: int, weights: Rewards) -> None:
    """Fill in the rewards of a group; a response that was not judged leaves it."""
    kept = [i for i, verdict in enumerate(verdicts) if verdict.judged]
    group.unjudged = [verdict.message for verdict in verdicts if not verdict.judged]
    group.rollouts = [group.rollouts[i] for i in kept]
    group.texts = [group.texts[i] for i in kept]
    group.rewards = [
        reward(verdicts[i], len(rollout.tokens), window=window, weights=weights)
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
            f"no answer could be judged: {batch.generated[0].unjudged[0]}",
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


def family_metrics(batch: SampledBatch, pools: Mapping[str, Pool]) -> dict[str, float]:
    """For every family that has ends: resolved rate, how often each end came, responses that were not judged."""
    return {name: value for pool in pools.values() if pool.ends for name, value in _of_family(batch, pool).items()}


def _of_family(batch: SampledBatch, pool: Pool) -> dict[str, float]:
    family = pool.family
    groups = [group for group in batch.generated if group.prompt.row.family == family]
    ends = Counter(reward.end for group in groups for reward in group.rewards)
    unjudged = sum(len(group.unjudged) for group in groups)
    by_task: dict[str, list[bool]] = {}
    for group in groups:
        for name in (f"{family}/resolved", f"{family}/resolved/{group.prompt.row.task}"):
            by_task.setdefault(name, []).extend(reward.correct for reward in group.rewards)
    return {
        f"{family}/responses": float(ends.total() + unjudged),
        f"{family}/unjudged": float(unjudged),
        **{name: sum(correct) / len(correct) for name, correct in sorted(by_task.items()) if correct},
        **{f"{family}/end/{end}": float(ends[end]) for end in pool.ends},
    }


def write_rollouts(file: Path, batch: SampledBatch) -> None:
    """One JSON object per response of a step, for reading; groups in the order they were generated."""
    kept = {group.position for group in batch.groups}
    write_rows(file, (line for group in batch.generated for line in _lines(group, group.position in kept)))


def _lines(group: Group, trained_on: bool) -> list[dict[str, object]]:
    row = group.prompt.row
    responses = zip(group.rollouts, group.texts, group.rewards, group.advantages, strict=True)
    return [
        {
            "family": row.family,
            "task": row.task,
            "id": row.id,
            "trained_on": trained_on,
            "prompt": row.question,
            "expected": row.answer,
            "response": text,
            "tokens": len(rollout.tokens),
            "finish_reason": rollout.finish_reason,
            "weight_version": rollout.weight_version,
            "correct": reward.correct,
            "formatted": reward.formatted,
            **({"end": reward.end} if reward.end else {}),
            "reward": round(reward.total, 4),
            "advantage": round(advantage, 4),
        }
        for rollout, text, reward, advantage in responses
    ]
