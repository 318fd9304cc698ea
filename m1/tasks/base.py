"""What a task family is: it makes rows, and it judges responses to them.

Data for the cold start, synthesis, reinforcement learning and evaluation go through the families in a loop; nothing
outside a family knows what is special about it. `m1.tasks.families` knows them by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import JsonValue

from m1.config.families import FamilyPrompts
from m1.config.profile import Profile
from m1.run.stage import Need
from m1.run.stop_signal import StopSignal

if TYPE_CHECKING:
    from m1.tasks.sandbox import Sandboxes

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Row:
    """One task as a line of a data set.

    Attributes:
        id: 16 hex digits or another name that no other task has.
        family, task: the family, and which of its tasks.
        difficulty: level of its generator, 1 the easiest.
        question: what is asked; prompt: the same as the model reads it, up to where its response begins.
        answer: one that is right, or empty where none is known.
        state: whatever the family's judge needs.
        response: a worked response, in data for the cold start.
    """

    id: str
    family: str
    task: str
    difficulty: int
    question: str
    prompt: str
    answer: str
    state: Mapping[str, JsonValue]
    response: str | None = None

    def to_json(self) -> dict[str, object]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values if self.response is not None else {k: v for k, v in values.items() if k != "response"}


@dataclass(frozen=True)
class Verdict:
    """How a response was judged.

    Attributes:
        value: what its content earns, from 0 to 1; meaningless where it was not judged.
        correct: whether it solves the task.
        formatted: one think block, then one answer block, nothing else.
        end: how it ended, one of the family's `ends`; empty in a family that has none.
        message: one line for people.
        judged: False where the judge itself failed: the response is neither right nor wrong, and is not counted.
    """

    value: float
    correct: bool
    formatted: bool
    end: str = ""
    message: str = ""
    judged: bool = True


class Judge(Protocol):
    """Judges responses of one family while its context is open."""

    def judge(self, asked: Sequence[tuple[Row, str]], stop: StopSignal | None = None) -> list[Verdict]:
        """Verdicts on (row, response), in order. No response makes it raise.

        Args:
            response: text after the assistant's header, closing token included.
            stop: once it is requested, judging is abandoned; all ranks take part.

        Raises:
            StopRequested: on every rank.
        """
        ...


class Tools(Protocol):
    """What families may need besides this process; `infra.tools` is it."""

    def sandboxes(self) -> Sandboxes:
        """Where untrusted code runs.

        Raises:
            ServiceError: there is none.
        """
        ...


@dataclass(frozen=True)
class Wish:
    """A request for rows.

    Attributes:
        purpose: "sft-data" (with worked responses) or "synthesize"; sets of another purpose hold other tasks.
        folder: of the data set being made; a family may put there what its rows refer to.
        taken: ids that no row may have; those of the rows made are added.
        tools: None where what the family needs is missing.
    """

    profile: Profile
    purpose: str
    split: Split
    folder: Path
    taken: set[str]
    tools: Tools | None = None


@dataclass(frozen=True)
class Made:
    """Rows, and what the data set's summary says of them; `left_out` tells what could not be made, and why."""

    rows: list[Row]
    summary: dict[str, JsonValue] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """Where a family's responses are to be judged.

    Attributes:
        folder: of the synthesised data set.
        prompts: how the stage asks this family.
        rank: of this process; rank 0 makes what all ranks use.
    """

    profile: Profile
    folder: Path
    prompts: FamilyPrompts
    rank: int
    tools: Tools


class TaskFamily(ABC):
    """A kind of tasks.

    Attributes:
        name: as in rows and in fields of the profile.
        about: one sentence for people.
        need: what making or judging takes besides this process.
        works_answers: whether it can write worked responses for the cold start.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    need: ClassVar[Need | None] = None
    works_answers: ClassVar[bool] = False

    @property
    def ends(self) -> tuple[str, ...]:
        """The values that `Verdict.end` can have, if the family uses it."""
        return ()

    @abstractmethod
    def make(self, wish: Wish) -> Made:
        """The rows of one split.

        Raises:
            UsageError: the profile asks for what cannot be made.
            ServiceError: what the family needs does not do its work.
        """

    @abstractmethod
    def judge(self, setting: Setting) -> AbstractContextManager[Judge]:
        """Open the family's judge; leaving the context frees what it holds. Every rank takes part."""

    def is_required(self, profile: Profile) -> bool:
        """Whether a run must stop where what the family needs is missing, instead of leaving the family out."""
        return False

    def rules(self, profile: Profile, stage: str) -> tuple[str, ...]:
        """What the section of `stage` asks of this family that is impossible, one clause each."""
        return ()

    @abstractmethod
    def modules(self, profile: Profile, stage: str) -> tuple[str, ...]:
        """Modules whose code decides what the family does in `stage`; `family.py` itself does not count."""
