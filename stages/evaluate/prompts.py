"""Prompts of the synthesised set, tokenised."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1.errors import UsageError
from m1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A row of `train.jsonl` or `heldout.jsonl` with the token ids of its prompt."""

    row: dict[str, Any]
    tokens: list[int]

    @property
    def task(self) -> str:
        return self.row["task"]


def read_prompts(file: Path, tokenizer: Tokenizer, max_length: int | None = None) -> list[Prompt]:
    """Rows of `train.jsonl` or `heldout.jsonl`, without those longer than `max_length` tokens.

    Raises:
        UsageError: no row is left.
    """
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    encoded = tokenizer.encode_batch([row["prompt"] for row in rows])
    prompts = [
        Prompt(row, ids) for row, ids in zip(rows, encoded, strict=True) if max_length is None or len(ids) <= max_length
    ]
    if not prompts:
        raise UsageError(
            f"{file}: none of the {len(rows)} prompts has at most max_prompt_length={max_length} tokens",
            "Raise max_prompt_length.",
        )
    return prompts


def first_of_each_task(prompts: Sequence[Prompt], per_task: int) -> list[Prompt]:
    """The first `per_task` prompts of every task, in the given order."""
    seen: Counter[str] = Counter()
    chosen = []
    for prompt in prompts:
        seen[prompt.task] += 1
        if seen[prompt.task] <= per_task:
            chosen.append(prompt)
    return chosen
