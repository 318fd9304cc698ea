"""The stage `synthesize`."""

from __future__ import annotations

from pathlib import Path

from infra import tools
from m1 import paths
from m1.config.profile import Profile
from m1.config.synthesize import Synthesize
from m1.run.stage import Kind, Stage
from m1.tasks import families


def _names(profile: Profile) -> tuple[str, ...]:
    return profile.section("synthesize", Synthesize).families()


def _plugins(profile: Profile) -> tuple[str, ...]:
    names = _names(profile)
    return (*families.modules(profile, names, "synthesize"), *tools.modules(families.demands(profile, names)))


def _specs(profile: Profile) -> tuple[Path, ...]:
    section = profile.section("synthesize", Synthesize)
    return (paths.DATA_SPECS / f"{section.swe.spec}.yaml",) if section.swe else ()


STAGES = (
    Stage(
        name="synthesize",
        about="Tasks with verifiable answers for reinforcement learning, and a held-out set.",
        kind=Kind.DATA,
        section=Synthesize,
        run="stages.synthesize.run:run",
        reads=("tokenizer", "sft-data"),
        unread=lambda profile: () if len(_names(profile)) > 1 else ("tokenizer",),  # questions are cut to a length
        settings=("seed",),
        rules=lambda profile: families.rules(profile, _names(profile), "synthesize"),
        files=_specs,
        spec_paths=("data_specs/swe.yaml",),
        plugins=_plugins,
        loads=("m1.tasks.logic", "m1.tasks.swe", "infra.sandbox"),
        demands=lambda profile: families.demands(profile, _names(profile)),
    ),
)
