"""The stage `corpus`."""

from __future__ import annotations

from pathlib import Path

from m1 import paths
from m1.config.corpus import Corpus
from m1.config.profile import Profile
from m1.run.stage import Kind, Stage


def _spec(profile: Profile) -> tuple[Path, ...]:
    return (paths.DATA_SPECS / f"{profile.section('corpus', Corpus).spec}.yaml",)


STAGES = (
    Stage(
        name="corpus",
        about="Real text from named packages is cleaned, filtered and de-duplicated.",
        kind=Kind.DATA,
        section=Corpus,
        run="stages.corpus.run:run",
        settings=("seed",),
        files=_spec,
        # DVC cannot look up the spec's name in the profile: all corpus specs (see .dvcignore).
        spec_paths=("data_specs",),
    ),
)
