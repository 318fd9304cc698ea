"""Prompts of the synthesised set, tokenised."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m1.errors import UsageError
from m1.stage import StageContext
from m1.tokenizer import Tokenizer

if TYPE_CHECKING:
    from stages.evaluate.swe import Swe


@dataclass(frozen=True)
class Prompt:
    """A row of a `train.jsonl` or `heldout.jsonl` with the token ids of its prompt."""

    row: dict[str, Any]
    tokens: list[int]

    @property
    def task(self) -> str:
        return self.row["task"]

    @property
    def swe(self) -> bool:
        """Whether its answer is judged in the sandbox, and not by a rule."""
        return self.task.startswith("swe-")


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


def open_swe(
    context: StageContext, split: str, tokenizer: Tokenizer
) -> AbstractContextManager[tuple[Swe | None, list[str]]]:
    """Software-engineering prompts of a split and the sandbox that judges their answers: see `stages.evaluate.swe`."""
    if context.section.swe is None:
        return contextlib.nullcontext((None, []))
    from stages.evaluate import swe  # only these tasks need the sandbox's packages

    return swe.opened(context, split, tokenizer)


def first_of_each_task(prompts: Sequence[Prompt], per_task: int) -> list[Prompt]:
    """The first `per_task` prompts of every task, in the given order."""
    seen: Counter[str] = Counter()
    chosen = []
    for prompt in prompts:
        seen[prompt.task] += 1
        if seen[prompt.task] <= per_task:
            chosen.append(prompt)
    return chosen
