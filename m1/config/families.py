"""What a section says of the task families: how tasks are made, and how they are put to the model.

A field about one family has the family's name, in `synthesize` (how its tasks are made) and in the sections of the
stages that ask them. The family `PLAIN` has no field of its own: the section's own fields are its settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import Field

from m1.config.base import Section

#: The family of generated problems, whose settings stand in the sections themselves.
PLAIN = "logic"


class FamilyTasks(Section):
    """How the tasks of one family are made."""


class FamilyPrompts(Section):
    """How a stage puts the tasks of one family to the model, and has the answers judged."""

    max_prompt_length: int | None = Field(None, ge=8, description="tokens; longer prompts are left out")


class SweTasks(FamilyTasks):
    """Software-engineering tasks from real packages, run in the sandbox; which are held out is said in the spec."""

    spec: str = Field("swe", description="file in data_specs, without .yaml")
    packages: list[str] = Field([], description="sources of the spec; all of them if empty")
    faults_per_package: int = Field(ge=1)
    question_length: int = Field(4096, ge=64, description="tokens; code is cut to what fits")
    when_no_engine: Literal["skip", "fail"] = Field(
        "skip",
        description="where no usable Docker engine answers: every stage leaves its part out and says so, or fails",
    )


class SwePrompts(FamilyPrompts):
    """How a stage puts software-engineering tasks to the model and has the answers judged in the sandbox."""

    max_prompt_length: int = Field(
        ge=64, description="tokens; at least synthesize.swe.question_length, the chat's own tokens come on top"
    )
    workers: int = Field(2, ge=1, description="answers that each rank has judged side by side")
    test_seconds: float = Field(300.0, gt=0, description="limit of one run of an answer's tests")


class RlSwe(SwePrompts):
    share: float = Field(gt=0, le=1, description="of the prompts that are rolled out, in every batch")


class EvaluateSwe(SwePrompts):
    tasks_per_kind: int = Field(ge=1, description="of the held-out packages, for each of repair, localise, write-test")
    samples_per_task: int = Field(1, ge=1)
    max_new_tokens: int | None = Field(None, ge=1, description="by default evaluate.max_new_tokens")


@dataclass(frozen=True)
class Share:
    """A family's part of reinforcement learning: how it is asked, and its share of the prompts of every batch."""

    prompts: FamilyPrompts
    share: float


@dataclass(frozen=True)
class Questions:
    """A family's part of an evaluation.

    Attributes:
        per_task: prompts of every task; before_sft: the same for the checkpoint before SFT.
        samples: responses to each.
    """

    prompts: FamilyPrompts
    per_task: int
    before_sft: int
    samples: int
    max_new_tokens: int


F = TypeVar("F", bound=Section)


def named(section: Section, kind: type[F]) -> dict[str, F]:
    """The families that have a field of this kind in the section: name -> what the field says."""
    values = {name.replace("_", "-"): getattr(section, name) for name in type(section).model_fields}
    return {name: value for name, value in values.items() if isinstance(value, kind)}
