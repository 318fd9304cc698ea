"""The task families there are. A new one is a package below `m1/tasks` and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping

from m1.config.profile import Profile
from m1.run.stage import Demand
from m1.tasks.base import TaskFamily

#: Name -> module with `FAMILY`, imported when it is asked for.
_MODULES = {
    "logic": "m1.tasks.logic.family",
    "swe": "m1.tasks.swe.family",
}


def family(name: str) -> TaskFamily:
    """The family of this name, which is known to exist."""
    return importlib.import_module(_MODULES[name]).FAMILY


def that_work_answers() -> tuple[str, ...]:
    """Names of the families that can write worked responses."""
    return tuple(name for name in _MODULES if family(name).works_answers)


def demands(profile: Profile, names: Iterable[str]) -> Mapping[str, Demand]:
    """What these families need besides this process."""
    found = {name: family(name) for name in names}
    return {name: Demand(each.need, each.is_required(profile)) for name, each in found.items() if each.need is not None}


def modules(profile: Profile, names: Iterable[str], stage: str) -> tuple[str, ...]:
    """Modules of these families that are loaded by name, for the identity of a stage that makes or asks their tasks."""
    return tuple(dict.fromkeys(module for name in names for module in family(name).modules(profile, stage)))


def rules(profile: Profile, names: Iterable[str], stage: str) -> tuple[str, ...]:
    """What a stage's section asks of these families that is impossible."""
    return tuple(clause for name in names for clause in family(name).rules(profile, stage))
