"""Judging answers by the tasks' own verifiers."""

from __future__ import annotations

from collections.abc import Sequence

from m1 import chat
from m1.run.stop_signal import StopSignal
from m1.tasks.base import Row, Verdict
from m1.tasks.logic import TASKS


class RuleJudge:
    """Judges by the tasks' own verifiers, at once."""

    def judge(self, asked: Sequence[tuple[Row, str]], stop: StopSignal | None = None) -> list[Verdict]:
        return [score(row, response) for row, response in asked]


def score(row: Row, response: str) -> Verdict:
    """Judge a response (text after the assistant's header) to a row.

    Only the answer block counts: an answer inside the think block earns nothing. No response text raises.
    """
    parsed = chat.parse_response(response)
    if parsed is None:
        return Verdict(value=0.0, correct=False, formatted=False)
    correct = TASKS[row.task].verify(dict(row.state), parsed[1])
    return Verdict(value=float(correct), correct=correct, formatted=True)
