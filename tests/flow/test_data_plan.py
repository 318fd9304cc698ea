"""When a data stage runs again: by what its code, its settings and its packages mean, not by the bytes of files."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scratch

from flows import plan as planning
from infra import launch
from m1 import paths
from m1.data import dvc, lock
from m1.run import identity
from m1.run.registry import stage

STAGES = ("corpus", "tokenizer", "sft-data")
#: Put into the light stage `corpus`: an import, an error with words, and a number that counts.
CODE = """
import safetensors

def helper():
    raise UsageError("there is no text", "Write some.")

NUMBER = 1
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy in which three data stages have run as the flow runs them."""
    folder = scratch.make(tmp_path_factory.mktemp("data") / "checkout")
    source = folder / "stages" / "corpus" / "run.py"
    source.write_text(source.read_text() + CODE)
    with pytest.MonkeyPatch.context() as patch:
        for name, place in scratch.PLACES.items():
            patch.setattr(paths, name, folder / place)
        dvc.ensure_profile("scratch")
        settings = planning.load_profile("scratch")
        for name in STAGES:
            launch.run_data_stage(settings, name, lambda line: None)
        yield folder


@pytest.fixture
def edit(made: Path) -> Iterator[Callable[[str, str, str], None]]:
    """Replaces text in a file; all that a test changes is as it was afterwards, dvc.lock too."""
    kept = {made / "dvc.lock": (made / "dvc.lock").read_text()}

    def replace(name: str, old: str, new: str) -> None:
        text = (made / name).read_text()
        kept.setdefault(made / name, text)
        assert old in text
        (made / name).write_text(text.replace(old, new, 1))

    yield replace
    for file, text in kept.items():
        file.write_text(text)


def rows() -> dict[str, str]:
    """Stage -> why it would run, of those that would."""
    planned = planning.plan(planning.load_profile("scratch"), only=list(STAGES))
    return {row.stage: row.reason for row in planned if row.action == "run"}


def by_dvc() -> dict[str, list[dvc.Change]]:
    found = dvc.status([f"{name}@scratch" for name in STAGES])
    return {name: found[f"{name}@scratch"] for name in STAGES}


def test_nothing_runs_where_nothing_has_changed(made: Path) -> None:
    assert rows() == {} and not any(by_dvc().values())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("NUMBER = 1", "NUMBER = 1  # counted by hand"),
        ('"""A light data stage', '"""A light stage, which makes data'),
        ("there is no text", "not a word"),
        ("NUMBER = 1", "NUMBER = (\n    1\n)"),
    ],
)
def test_words_make_nothing_anew_and_dvc_hears_of_them(
    made: Path, edit: Callable[[str, str, str], None], old: str, new: str
) -> None:
    edit("stages/corpus/run.py", old, new)
    changes = by_dvc()["corpus"]
    assert [change.name for change in changes] == ["stages/corpus/run.py"], "DVC goes by bytes"
    assert planning.data_reasons(planning.load_profile("scratch"), "corpus", changes) == [] and rows() == {}

    before = lock.entry("corpus", "scratch")
    dvc.commit("corpus@scratch")  # what the flow does with a stage that it skips
    after = lock.entry("corpus", "scratch")
    assert before is not None and after is not None
    assert after.digest == before.digest and after.deps != before.deps
    assert not any(by_dvc().values()) and rows() == {}


def test_a_line_of_code_makes_its_stage_anew_and_those_that_read_it(edit: Callable[[str, str, str], None]) -> None:
    edit("stages/corpus/run.py", "NUMBER = 1", "NUMBER = 2")
    found = rows()
    assert found.pop("corpus") == "code: changed"
    assert found == {"tokenizer": "upstream: corpus will run (skipped after all if that changes nothing)"}


def test_code_and_settings_are_named_together(edit: Callable[[str, str, str], None]) -> None:
    edit("stages/corpus/run.py", "NUMBER = 1", "NUMBER = 2")
    edit("profiles/scratch.yaml", "max_megabytes: 8.0", "max_megabytes: 2.0")
    assert rows()["corpus"] == "profile: corpus.max_megabytes 8.0 -> 2.0; code: changed"


def test_a_package_of_another_version_makes_anew_what_imports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def with_other(package: str) -> dict[str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == package else version(name))
            return {name: reason for name, reason in rows().items() if "upstream" not in reason}

    assert with_other("safetensors") == {"corpus": f'package: safetensors "{version("safetensors")}" -> "9.9"'}
    assert with_other("megatron-core") == {}, "no data stage of these imports it"


def test_a_runs_own_seed_does_not_reach_the_data_stages_and_the_profiles_does(
    edit: Callable[[str, str, str], None],
) -> None:
    """A data stage reads the profile's file, so that DVC can tell what a data set was made from."""
    other = planning.plan(planning.load_profile("scratch", seed=77), only=list(STAGES))
    assert {row.action for row in other} == {"skip"}
    edit("profiles/scratch.yaml", "seed: 1234", "seed: 77")
    seeded = {name for name in STAGES if "seed" in stage(name).settings}
    assert {name for name, reason in rows().items() if reason == "profile: seed 1234 -> 77"} == seeded
    assert seeded == {"corpus", "sft-data"}


def test_a_section_of_another_stage_makes_nothing_anew(edit: Callable[[str, str, str], None]) -> None:
    edit("profiles/scratch.yaml", "train_megabytes: 8.0", "train_megabytes: 4.0")
    assert rows() == {"tokenizer": "profile: tokenizer.train_megabytes 8.0 -> 4.0"}


def test_what_a_data_set_was_made_by_is_known_of_older_ones_too() -> None:
    """`dvc checkout` may bring one back: it is compared with its own code and settings, not with the newest."""
    settings, record = planning.load_profile("scratch"), stage("corpus")
    mine = lock.digest("corpus", "scratch")
    assert mine is not None
    first = identity.made_by(record, settings, mine)
    assert first == identity.data_identity(record, settings)
    identity.note_made(record, settings, {**first, "code": "another"})
    assert identity.made_by(record, settings, mine) == first, "not before DVC has hashed what was made"
    identity.note_recorded(record, settings, "0123.dir")
    assert identity.made_by(record, settings, "0123.dir") == {**first, "code": "another"}
    assert identity.made_by(record, settings, mine) == first
    identity.note_recorded(record, settings, "4567.dir")
    assert identity.made_by(record, settings, "4567.dir") is None, "nothing has been made since"


def test_where_nobody_noted_what_it_was_made_by_dvcs_word_counts(
    made: Path, edit: Callable[[str, str, str], None]
) -> None:
    """A data set that came with `dvc pull`, say: its code cannot be told from its comments."""
    notes = made / "data" / "scratch" / ".identity"
    aside = notes.rename(made / "notes")
    try:
        assert rows() == {}
        edit("stages/corpus/run.py", "NUMBER = 1", "NUMBER = 1  # counted by hand")
        assert rows()["corpus"] == "code: stages/corpus/run.py changed"
    finally:
        shutil.rmtree(notes, ignore_errors=True)
        aside.rename(notes)
