"""Build the pretraining corpus of a profile."""

from __future__ import annotations

from pathlib import Path

from m1.config.corpus import Corpus
from m1.config.profile import Profile
from m1.data import corpus_spec
from m1.run.contract import Summary
from stages.corpus.build import build


def run(profile: Profile, output: Path) -> Summary:
    """Write `documents.jsonl`, `rejected.jsonl` and `licences/`; the spec is `data_specs/<corpus.spec>.yaml`."""
    section = profile.section("corpus", Corpus)
    return build(
        corpus_spec.load(section.spec),
        max_bytes=int(section.max_megabytes * 1e6),
        seed=profile.seed,
        output=output,
    )
