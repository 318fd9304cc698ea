"""The reward of one response: what its content earns, its format, and the soft overlong punishment."""

from __future__ import annotations

from dataclasses import dataclass

from m1.config.rl import Rewards
from m1.tasks.base import Verdict


@dataclass(frozen=True)
class Reward:
    """What one response earned; `total` is what the advantage is computed from."""

    total: float
    correct: bool
    formatted: bool
    overlong: float
    #: How the answer ended, in a family that has ends.
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


def reward(verdict: Verdict, length: int, *, window: int, weights: Rewards) -> Reward:
    """Reward of a response.

    Args:
        length: of the response in tokens.
        window: the output window in tokens that it was generated under.

    Raises:
        ValueError: it was not judged; there is no reward for that.
    """
    if not verdict.judged:
        raise ValueError(f"an answer that was not judged has no reward: {verdict.message}")
    overlong = weights.overlong_penalty * overlong_penalty(length, window, weights.overlong_cache)
    total = weights.correct * verdict.value + weights.format * verdict.formatted + overlong
    return Reward(total, verdict.correct, verdict.formatted, overlong, verdict.end)
