"""Responses of the present policy: each data-parallel rank generates its share, and every rank then has them all."""

from __future__ import annotations

import statistics

from m1.generation import generate, row_seed
from m1.model.decoder import Decoder
from m1.profile import Rl
from m1.tokenizer import Tokenizer
from m1.training import parallel
from stages.rl.objectives import percentile
from stages.rl.rewards import judge
from stages.rl.sampling import Group, Prompt, SampledBatch

import torch


class RolloutWorker:
    """Generates and judges groups of responses.

    Args:
        seed: a response's random numbers come from (seed, position of its prompt, its index in the group).
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, section: Rl, seed: str) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.section = section
        self.seed = seed

    def roll_out(self, prompts: list[tuple[int, Prompt]], window: int, group_size: int) -> list[Group]:
        """One group per (position, prompt), in order, the same on every rank."""
        mine = prompts[parallel.data_parallel_rank() :: parallel.data_parallel_size()]
        rollouts = generate(
            self.decoder,
            [prompt.tokens for _, prompt in mine],
            max_new_tokens=window,
            eos_id=self.tokenizer.eos_id,
            seeds=[[row_seed(self.seed, position, i) for i in range(group_size)] for position, _ in mine],
            temperature=self.section.temperature,
            repetition=self.section.repetition,
        )
        groups = []
        for (position, prompt), responses in zip(mine, rollouts, strict=True):
            texts = [self.tokenizer.decode(response.tokens) for response in responses]
            rewards = [
                judge(prompt.row, text, len(response.tokens), window=window, weights=self.section.rewards)
                for text, response in zip(texts, responses, strict=True)
            ]
            groups.append(Group(position, prompt, responses, texts, rewards))
        return parallel_interleave(groups, len(prompts))


def parallel_interleave(mine: list[Group], total: int) -> list[Group]:
    """Undo the split `prompts[rank::size]`: every rank's items in their common order."""
    gathered: list[list[Group]] = [[] for _ in range(parallel.data_parallel_size())]
    torch.distributed.all_gather_object(gathered, mine, group=parallel.data_parallel_group())
    return [gathered[i % len(gathered)][i // len(gathered)] for i in range(total)]
