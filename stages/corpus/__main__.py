"""Build the pretraining corpus of a profile: `python -m stages.corpus --profile tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m1.profile import Profile
from m1.stage import data_main
from stages.corpus import spec
from stages.corpus.build import build


def run(settings: Profile, output: Path) -> dict[str, Any]:
    """Write `documents.jsonl`, `rejected.jsonl` and `licences/`; the spec is `data_specs/<corpus.spec>.yaml`."""
    return build(
        spec.load(settings.corpus.spec),
        max_bytes=int(settings.corpus.max_megabytes * 1e6),
        seed=settings.seed,
        output=output,
    )


if __name__ == "__main__":
    data_main(run)
