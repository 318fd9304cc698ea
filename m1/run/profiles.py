"""Reading a profile: one YAML file describes a whole run.

Unknown fields, wrong types and impossible combinations are refused with the file, the field, the value and what is
allowed, before anything starts. Neither torch nor Prefect is imported: every command can read a profile at once.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import Field, ValidationError, create_model, model_validator

from m1 import paths
from m1.config.base import refuse
from m1.config.profile import Profile
from m1.config.reading import describe, override, read_yaml
from m1.errors import UsageError
from m1.run.registry import stage, stages


class _Checked(Profile):
    """A profile whose order and stages are possible."""

    @model_validator(mode="after")
    def _is_possible(self) -> _Checked:
        refuse(_order_rules(self))
        refuse(clause for name in self.order for clause in stage(name).rules(self))
        return self


@functools.cache
def profile_type() -> type[Profile]:
    """The type of a whole profile: a section for every stage, which a profile must have for those of its order."""
    fields = {
        name.replace("-", "_"): (record.section | None, Field(None, description=record.about))
        for name, record in stages().items()
    }
    return create_model("Profile", __base__=_Checked, **fields)  # type: ignore[call-overload]


def _order_rules(profile: Profile) -> Iterator[str]:
    """What is wrong with the order, the first fault only: others may follow from it."""
    seen: list[str] = []
    for name in profile.order:
        if name not in stages():
            near = difflib.get_close_matches(name, stages(), n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(stages())}"
            yield f"order: {name!r} is not a stage; {hint}"
            return
        record = stage(name)
        if name in seen:
            yield f"order: {name} appears twice"
        elif (late := next((r for r in record.reads if r in profile.order and r not in seen), None)) is not None:
            yield f"order: {name} reads {late}, which must come before it"
        elif record.needs_checkpoint and not any(stage(earlier).trains for earlier in seen):
            yield f"order: {name} needs a trained parent, put pretrain before it"
        elif (early := next((a for a in record.after if a in profile.order and a not in seen), None)) is not None:
            yield f"order: {name} continues {early} and must come after it"
        else:
            seen.append(name)
            continue
        return
    missing = [read for name in profile.order for read in stage(name).reads if read not in profile.order]
    if missing:
        yield f"order: {missing[0]} is missing, and a later stage reads it"
        return
    for name in profile.order:
        if profile.find(name, stage(name).section) is None:
            yield f"{name}: missing; the order names it, give it a section"


def available() -> list[str]:
    """Names of the profiles in `profiles/`."""
    return sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


def load(name_or_path: str, *, overrides: Mapping[str, object] | None = None) -> Profile:
    """Read and check a profile.

    Args:
        name_or_path: a name in `profiles/`, or a path to a YAML file.
        overrides: dotted fields and their values, for example {"pretrain.train_steps": 10}.

    Raises:
        UsageError: the file is missing or not YAML, or a field is unknown, mistyped or impossible.
    """
    path = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else paths.PROFILES / f"{name_or_path}.yaml"
    if not path.is_file():
        raise UsageError(f"profile {name_or_path!r}: no file {path}", f"Choose one of: {', '.join(available())}.")
    content = read_yaml(path)
    for dotted, value in (overrides or {}).items():
        override(content, dotted, value, str(path))
    return parse(content, str(path))


def parse(content: Mapping[str, object], source: str) -> Profile:
    """Check a profile given as plain values; `source` names it in error messages.

    Raises:
        UsageError: a field is unknown, mistyped or impossible.
    """
    try:
        return profile_type().model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{source}: {describe(error, profile_type())}") from error
