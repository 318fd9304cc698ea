"""Rows of a data set as prompts: read once, tokenised, by family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from m1.errors import UsageError
from m1.files import read_rows as read_json_rows
from m1.tasks.base import Row
from m1.tokenizer import Tokenizer

_FIELDS = {field.name for field in fields(Row)}


@dataclass(frozen=True)
class Prompt:
    """A row with the token ids of its prompt."""

    row: Row
    tokens: list[int]


def read_rows(file: Path, hint: str = "Run the stage that makes it again.") -> list[Row]:
    """Rows of `train.jsonl` or `heldout.jsonl`.

    Raises:
        UsageError: the file is missing or damaged, or of an older form.
    """
    rows = []
    for number, content in enumerate(read_json_rows(file, hint), 1):
        if content.keys() - _FIELDS or _FIELDS - content.keys() - {"response"}:
            raise UsageError(f"{file}:{number} is not a row of tasks: it has {', '.join(sorted(content))}", hint)
        rows.append(Row(**content))
    return rows


def tokenised(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int | None = None) -> list[Prompt]:
    """Prompts of these rows, without those longer than `max_length` tokens."""
    encoded = tokenizer.encode_chats([row.prompt for row in rows])
    pairs = zip(rows, encoded, strict=True)
    return [Prompt(row, ids) for row, ids in pairs if max_length is None or len(ids) <= max_length]


def first_of_each_task(prompts: Sequence[Prompt], per_task: int) -> list[Prompt]:
    """The first `per_task` prompts of every task, in the given order."""
    seen: Counter[tuple[str, str]] = Counter()
    chosen = []
    for prompt in prompts:
        key = (prompt.row.family, prompt.row.task)
        seen[key] += 1
        if seen[key] <= per_task:
            chosen.append(prompt)
    return chosen
