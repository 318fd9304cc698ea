"""Rule rewards of one response: correctness, format, and the soft overlong punishment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from m1.profile import Rewards
from stages.synthesize.rewards import score

if TYPE_CHECKING:
    from stages.evaluate.swe import Verdict


@dataclass(frozen=True)
class Reward:
    """What one response earned; `total` is what the advantage is computed from."""

    total: float
    correct: bool
    formatted: bool
    overlong: float
    #: Of a software-engineering task: how its answer ended.
    end: str = ""


def overlong_penalty(length: int, window: int, cache: int) -> float:
    """Soft overlong punishment in [-1, 0] (DAPO, arXiv 2503.14476, Eq. 13).

    0 up to window - cache tokens, falling linearly to -1 at the window, -1 beyond it.
    """
    free = window - cache
    if length <= free:
        return 0.0
    if length > window:
        return -1.0
    return (free - length) / cache


def judge(row: Mapping[str, Any], response: str, length: int, *, window: int, weights: Rewards) -> Reward:
    """Reward of a response to a row of the synthesised set.

    Args:
        response: its text, closing token included.
        length: its length in tokens.
        window: the output window in tokens that it was generated under.
    """
    result = score(row, response)
    return _reward(float(result.correct), result.correct, result.formatted, length, window, weights)


def judge_verdict(verdict: Verdict, length: int, *, window: int, weights: Rewards) -> Reward:
    """Reward of a response to a software-engineering task; localisation earns a part of `correct` by its overlap.

    Raises:
        ValueError: the sandbox failed; there is no reward for that.
    """
    if not verdict.judged:
        raise ValueError(f"an answer that was not judged has no reward: {verdict.message}")
    reward = _reward(verdict.value, verdict.resolved, verdict.formatted, length, window, weights)
    return replace(reward, end=verdict.end)


def _reward(value: float, correct: bool, formatted: bool, length: int, window: int, weights: Rewards) -> Reward:
    overlong = weights.overlong_penalty * overlong_penalty(length, window, weights.overlong_cache)
    return Reward(weights.correct * value + weights.format * formatted + overlong, correct, formatted, overlong)
