"""What an RL stage keeps between its steps, and in its checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from m1.training.saving import Saver
from m1.training.stopping import StopRequested
from stages.rl.windows import WindowSchedule


@dataclass
class State:
    """Learning rate and random numbers are functions of the step; what remains is here.

    Attributes:
        step: batches of rollouts that are done.
        cursor: position of the next prompt.
        schedule: state of the output windows, None before the first step.
        notes: sentences for the report.
        heldout: (step, held-out pass@1 by task) of every measurement.
    """

    step: int = 0
    cursor: int = 0
    schedule: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    heldout: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @classmethod
    def resumed(cls, saver: Saver) -> State | None:
        """The state of the newest checkpoint, which is loaded; None where there is none."""
        saved = saver.resume()
        return None if saved is None else cls(**{name: saved[name] for name in cls.__dataclass_fields__})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def note(self, sentence: str) -> None:
        """Keep a sentence, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def advance(self, cursor: int, schedule: WindowSchedule) -> None:
        """One more step is done."""
        self.step += 1
        self.cursor, self.schedule = cursor, schedule.state()

    @contextlib.contextmanager
    def kept_when_stopped(self, saver: Saver) -> Iterator[None]:
        """Work that is abandoned when SIGTERM comes: the stage ends with a checkpoint of this state.

        Raises:
            Checkpointed: it came.
        """
        try:
            yield
        except StopRequested:
            saver.leave(self.to_json())
