"""What every section of a profile has in common."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a profile: unknown fields are errors, values are frozen, nothing is coerced from another type.

    Infinite numbers and NaN are no settings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def refuse(broken: Iterable[str]) -> None:
    """Make validation fail with these rules, if there are any."""
    clauses = "; ".join(broken)
    if clauses:
        raise ValueError(clauses)
