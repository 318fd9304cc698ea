"""A whole run in one frozen record. `m1.run.profiles` reads one from its file and checks it."""

from __future__ import annotations

from typing import TypeVar

from pydantic import AliasGenerator, ConfigDict, Field, JsonValue, model_validator

from m1.config import layout
from m1.config.base import Section, refuse
from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.config.running import Checkpoints, FlowSettings

S = TypeVar("S", bound=Section)


class Profile(Section):
    """A run: the order of its stages, and what they share. Every stage's own section is a further field.

    The sections of the stages are added to it by `m1.run.profiles`, from the records of the stages.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        alias_generator=AliasGenerator(alias=lambda field: field.replace("_", "-")),
        populate_by_name=False,
    )

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    seed: int = Field(ge=0)
    order: list[str] = Field(min_length=1)
    flow: FlowSettings = FlowSettings()
    checkpoints: Checkpoints = Checkpoints()
    model: Model
    parallel: Parallel

    def section(self, name: str, kind: type[S]) -> S:
        """The section `name` (for example "rl-40k"), which is of this kind.

        Raises:
            KeyError: the profile has no such section, or one of another kind: a fault of the caller.
        """
        found = self.find(name, kind)
        if found is None:
            raise KeyError(f"profile {self.name} has no section {name} of kind {kind.__name__}")
        return found

    def find(self, name: str, kind: type[S]) -> S | None:
        """As `section`, or None where the profile has none."""
        found = getattr(self, name.replace("-", "_"), None)
        return found if isinstance(found, kind) else None

    def to_dict(self) -> dict[str, JsonValue]:
        """Plain JSON values with the same keys as the YAML file, every default resolved."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=False)

    @model_validator(mode="after")
    def _layout_is_possible(self) -> Profile:
        refuse(f"parallel: {rule}" for rule in layout.broken_rules(self.model, self.parallel))
        return self
