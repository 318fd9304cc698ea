"""Judge a response to a generated problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m1 import chat
from stages.synthesize.tasks import TASKS


@dataclass(frozen=True)
class Score:
    """What a response earned.

    Attributes:
        correct: it is well formed and its answer block solves the problem.
        formatted: one think block, then one answer block, nothing else.
    """

    correct: bool
    formatted: bool


def score(problem_row: Mapping[str, Any], response_text: str) -> Score:
    """Score a response (text after the assistant's header) to a row of `train.jsonl` or `heldout.jsonl`.

    Only the answer block counts: an answer inside the think block earns nothing. No response text raises.
    """
    parsed = chat.parse_response(response_text)
    if parsed is None:
        return Score(correct=False, formatted=False)
    correct = TASKS[problem_row["task"]].verify(problem_row["state"], parsed[1])
    return Score(correct=correct, formatted=True)
