"""Responses of the present policy, judged; and what is written down of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from m1.generation import gather_shares, generate, row_seed, share_of_rank
from m1.model.decoder import Decoder
from m1.profile import Rl
from m1.tokenizer import Tokenizer
from m1.training.stopping import StopRequest
from stages.evaluate.prompts import Prompt
from stages.rl.objectives import percentile
from stages.rl.rewards import judge
from stages.rl.sampling import Group, SampledBatch


class RolloutWorker:
    """Generates and judges groups of responses; the data-parallel ranks share the prompts.

    Args:
        seed: with the position of a prompt and the index in its group it fixes a response's random numbers.
        stop: once it is requested, rollouts are abandoned.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, section: Rl, seed: str, stop: StopRequest) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.section = section
        self.seed = seed
        self.stop = stop

    def roll_out(self, prompts: Sequence[tuple[int, Prompt]], window: int, group_size: int) -> list[Group]:
        """One group per (position, prompt), in that order, the same on every rank.

        Args:
            window: output limit in tokens.

        Raises:
            StopRequested: on every rank.
        """
        mine = share_of_rank(prompts)
        rollouts = generate(
            self.decoder,
            [prompt.tokens for _, prompt in mine],
            max_new_tokens=window,
            eos_id=self.tokenizer.eos_id,
            seeds=[[row_seed(self.seed, position, i) for i in range(group_size)] for position, _ in mine],
            repetition=self.section.repetition,
            stop=self.stop,
        )
        groups = []
        for (position, prompt), responses in zip(mine, rollouts, strict=True):
            texts = [self.tokenizer.decode(response.tokens) for response in responses]
            rewards = [
                judge(prompt.row, text, len(response.tokens), window=window, weights=self.section.rewards)
                for text, response in zip(texts, responses, strict=True)
            ]
            groups.append(Group(position, prompt, responses, texts, rewards))
        return gather_shares(groups, len(prompts))


def rollout_metrics(batch: SampledBatch) -> dict[str, float]:
    """Means over all responses generated in a step, dropped groups included."""
    rewards = [reward for group in batch.generated for reward in group.rewards]
    rollouts = [rollout for group in batch.generated for rollout in group.rollouts]
    lengths = torch.tensor([float(len(rollout.tokens)) for rollout in rollouts])
    tokens = float(lengths.sum())
    entropy = -sum(sum(rollout.logprobs) for rollout in rollouts) / tokens
    count, groups = len(rollouts), len(batch.generated)
    solved = sum(all(reward.correct for reward in group.rewards) for group in batch.generated)
    failed = sum(not any(reward.correct for reward in group.rewards) for group in batch.generated)
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
        "rl/groups_all_correct": solved / groups,
        "rl/groups_none_correct": failed / groups,
        "rl/generation_rounds": float(batch.rounds),
        "rl/generated_tokens": tokens,
        "rl/tokens": tokens + sum(len(group.prompt.tokens) * len(group.rollouts) for group in batch.generated),
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
                    "reward": round(reward.total, 4),
                    "advantage": round(advantage, 4),
                }
                out.write(json.dumps(line) + "\n")
    os.replace(unfinished, file)
