"""What a rollout engine must do: it generates responses, for reinforcement learning and evaluation.

Token ids go in; token ids, log-probabilities, why each response ended and the version of the weights come out. Text is
never tokenised between a response and what is learned from it. `m1.rollout.recurrent` has the engine that decodes in
the trainer's own process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from m1.config.rl import Repetition
from m1.run.stop_signal import StopSignal


@dataclass
class Rollout:
    """One sampled response.

    Attributes:
        tokens: sampled ids, the end token included when it was sampled.
        logprobs: log-probability of each sampled token under softmax(logits): temperature 1, nothing cut off. With
            temperature 1 and top_p 1 this is the distribution the token was drawn from.
        finish_reason: "stop" (end token), "length" (limit reached), or "repetition" (stopped early).
        weight_version: of the weights that every token was sampled with; see `RolloutEngine.update_weights`.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "repetition"] = "length"
    weight_version: int = 0


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        max_new_tokens: the output window.
        temperature, top_p: the distribution: softmax(logits / temperature) cut to its nucleus.
        repetition: stop a response after this many consecutive tokens that each had a probability (at temperature 1)
            above the threshold (MiniMax-M1 report §3.2).
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    repetition: Repetition | None = None


class RolloutEngine(Protocol):
    """Generates responses. Every rank of a process group calls every method at the same point."""

    #: Number of the weights in use; it rises with every update.
    weight_version: int

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        stop: StopSignal | None = None,
    ) -> list[list[Rollout]]:
        """Sample responses: as many to each prompt as it has seeds.

        The random numbers of a response come from its own seed alone, so that the result does not depend on which
        others are generated beside it, up to float rounding of the logits.

        Args:
            prompts: token ids, none empty.
            seeds: per prompt one integer per wanted response; see `row_seed`.
            stop: once any rank has been asked to stop, all of them abandon what they generate.

        Returns:
            Per prompt its rollouts, in the order of its seeds.

        Raises:
            StopRequested: on every rank.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Generate with the trainer's present weights from now on; they are called `version`."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it generates nothing afterwards."""
        ...


def row_seed(*parts: int | str) -> int:
    """A 63-bit seed from any identifying values, for example (run seed, step, prompt id, sample index)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
