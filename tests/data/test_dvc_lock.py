"""`dvc.lock` in the repository is that of the committed code, so that a run in a fresh clone changes no file of it."""

from __future__ import annotations

from m1 import paths
from m1.data import dvc, lock
from m1.run.registry import data_stages


def test_it_was_recorded_with_this_code_and_these_settings() -> None:
    targets = [f"{name}@tiny" for name in data_stages()]
    changes = dvc.status(targets)
    stale = {
        f"{target}: {change.text}"
        for target in targets
        for change in changes[target]
        if not change.name.startswith("data/")  # a fresh clone has no data yet
    }
    assert stale == set(), "make tiny's data sets again: m1 run --profile tiny --stop synthesize"


def test_it_holds_the_data_sets_of_tiny_and_no_other() -> None:
    for name in data_stages():
        recorded = lock.entry(name, "tiny")
        assert recorded is not None and recorded.files > 0
        for path, digest in recorded.deps:
            if path.startswith("data/"):
                source = lock.entry(path.rpartition("/")[2], "tiny")
                assert source is not None and source.digest == digest, path
    assert "@smoke" not in (paths.ROOT / lock.NAME).read_text()
