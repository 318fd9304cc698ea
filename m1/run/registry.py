"""The stages there are, found in the packages below `stages/`, and what follows from their order in a profile."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path

from m1.config.profile import Profile
from m1.run.stage import Stage


@functools.cache
def stages() -> Mapping[str, Stage]:
    """Every stage by name; a stage comes after those whose data it reads, else packages are in alphabetical order."""
    found: dict[str, Stage] = {}
    package = Path(importlib.import_module("stages").__path__[0])
    for file in sorted(package.glob("*/stage.py")):
        for record in importlib.import_module(f"stages.{file.parent.name}.stage").STAGES:
            assert record.name not in found, f"two stages are named {record.name}"
            found[record.name] = record
    ordered: dict[str, Stage] = {}

    def place(record: Stage) -> None:
        for name in record.reads:
            if name in found and name not in ordered:
                place(found[name])
        ordered.setdefault(record.name, record)

    for record in sorted(found.values(), key=lambda record: not record.makes_data):
        place(record)
    return ordered


def stage(name: str) -> Stage:
    """The record of a stage that is known to exist."""
    return stages()[name]


def data_stages() -> tuple[str, ...]:
    """Names of the stages that write data sets."""
    return tuple(name for name, record in stages().items() if record.makes_data)


def training_stages(profile: Profile) -> tuple[str, ...]:
    """Names of the profile's stages that leave checkpoints, in its order."""
    return tuple(name for name in profile.order if stage(name).trains)


def of_package(package: str) -> tuple[Stage, ...]:
    """The stages whose work is in one package."""
    return tuple(record for record in stages().values() if record.package == package)


def parent_of(profile: Profile, name: str) -> str | None:
    """The training stage whose checkpoint `name` starts from, by the profile's order."""
    before = [earlier for earlier in profile.order[: profile.order.index(name)] if stage(earlier).trains]
    return before[-1] if before else None
