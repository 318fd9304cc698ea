"""The schedule of output windows (MiniMax-M1 report §5: 40K, 48K, ..., 80K)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from m1.config.rl import WindowCriteria


@dataclass
class WindowSchedule:
    """Which output window is in force and when the next one follows.

    The report names two indicators without thresholds: the perplexity of the generated sequences has converged, and
    the 99th percentile of their lengths is close to the window. Both must hold; `max_steps` moves on without them.

    Attributes:
        windows: rising output lengths in tokens.
        criteria: thresholds; None only with a single window.
        index: position of the current window.
        perplexities: one value per step spent in the current window.
    """

    windows: list[int]
    criteria: WindowCriteria | None
    index: int = 0
    perplexities: list[float] = field(default_factory=list)

    @property
    def window(self) -> int:
        return self.windows[self.index]

    def update(self, perplexity: float, length_p99: float) -> str | None:
        """Take in one step's rollouts; move to the next window if it is time.

        Args:
            perplexity: exp(-mean log-probability) of the step's generated tokens.
            length_p99: 99th percentile of their lengths in tokens.

        Returns:
            Why it moved on, as a sentence for the report, or None if it did not.
        """
        self.perplexities.append(perplexity)
        if self.criteria is None or self.index == len(self.windows) - 1:
            return None
        reason = self._reason(length_p99)
        if reason is None:
            return None
        left = self.window
        self.index += 1
        self.perplexities = []
        return f"window {left} -> {self.window}: {reason}"

    def _reason(self, length_p99: float) -> str | None:
        assert self.criteria is not None
        seen, patience = self.perplexities, self.criteria.patience
        if len(seen) > patience:
            change = abs(seen[-1] / seen[-1 - patience] - 1)
            long_enough = length_p99 >= self.criteria.length_fraction * self.window
            if change < self.criteria.perplexity_change and long_enough:
                return (
                    f"perplexity changed by {change:.1%} over {patience} steps, 99th percentile {length_p99:.0f} tokens"
                )
        if len(seen) >= self.criteria.max_steps:
            return f"forced after {len(seen)} steps, the criteria did not hold"
        return None

    def state(self) -> dict[str, Any]:
        """Plain values; `resumed` takes them back."""
        return {"index": self.index, "perplexities": list(self.perplexities)}

    @classmethod
    def resumed(
        cls, windows: list[int], criteria: WindowCriteria | None, state: Mapping[str, Any] | None
    ) -> WindowSchedule:
        """A schedule as it was when `state` was taken; at its beginning without one."""
        schedule = cls(windows, criteria)
        if state:
            schedule.index, schedule.perplexities = state["index"], list(state["perplexities"])
        return schedule
