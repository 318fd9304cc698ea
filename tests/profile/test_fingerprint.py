"""The identity of a stage: what changes it and what does not."""

from __future__ import annotations

import ast
import fnmatch
from collections.abc import Callable
from pathlib import Path

import pytest

from m1 import paths
from m1.run import closure, code
from m1.run import identity as identities
from m1.run import profiles as profile
from m1.run.identity import fingerprint
from m1.run.registry import stage, stages
from m1.run.stage import Origin

DATA = {"tokenizer": "a" * 32, "tokens": "b" * 32}


def identity(name: str, data: dict[str, str] = DATA, parent: str | None = None, **overrides: object) -> str:
    changed = {name.replace("__", ".").replace("rl_40k", "rl-40k"): value for name, value in overrides.items()}
    return fingerprint(name, profile.load("tiny", overrides=changed), data, parent=parent)


@pytest.mark.parametrize("name", ["pretrain", "sft", "context-extension", "rl-40k", "rl-80k"])
def test_its_own_section_model_data_parent_and_seed_count(name: str) -> None:
    same = identity(name)
    assert same == identity(name)
    assert same != identity(name, model__hidden_size=64)
    assert same != identity(name, seed=5)
    assert same != identity(name, parent="f" * 64)
    assert same != identity(name, data={**DATA, "tokens": "c" * 32})


def test_another_stages_section_does_not_count() -> None:
    assert identity("pretrain") == identity("pretrain", sft__epochs=3.0)
    assert identity("sft") != identity("sft", sft__epochs=3.0)
    assert identity("rl-80k") == identity("rl-80k", rl_40k__train_steps=3)


def test_a_base_model_counts_by_its_content_and_a_family_left_out_by_its_name() -> None:
    tiny = profile.load("tiny")

    def of(**more: object) -> str:
        return fingerprint("pretrain", tiny, DATA, **more)  # type: ignore[arg-type]

    here, there = Origin("/here/base", "1" * 64), Origin("/there/base", "1" * 64)
    assert of(origin=here) == of(origin=there) != of()
    assert of(origin=here) != of(origin=Origin("/here/base", "2" * 64))
    assert of(left_out=("swe",)) != of()
    assert of(left_out=("swe", "code")) == of(left_out=("code", "swe"))


def test_the_runs_upstream_count_where_a_stage_compares_them() -> None:
    tiny = profile.load("tiny")
    for name in ("rl-40k", "evaluate"):
        alone, with_history = (fingerprint(name, tiny, DATA, history=runs) for runs in ((), ("a" * 16, "b" * 16)))
        assert (alone == with_history) == (not stage(name).compares_history)


# --- code ---


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Hash of a file with this text."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)

    def of(text: str, name: str = "stage.py") -> str:
        (tmp_path / name).write_text(text)
        return code.digest([tmp_path / name])

    return of


def test_comments_and_docstrings_do_not_count_but_code_does(digest: Callable[..., str]) -> None:
    original = digest('"""A stage."""\n\n\ndef run(x):\n    """Run."""\n    return x + 1\n')
    assert original == digest("def run(x):\n    # adds one\n    return x + 1\n")
    assert original != digest("def run(x):\n    return x + 2\n")


@pytest.mark.parametrize(
    "line",
    [
        "raise ValueError({!r})",
        "print({!r})",
        "log.warning({!r}, 1)",
        "context.progress(1, 2, {!r})",
        "field: int = Field(1, description={!r})",
    ],
)
def test_what_is_said_to_people_does_not_count(digest: Callable[..., str], line: str) -> None:
    assert digest(line.format("one wording")) == digest(line.format("another"))
    assert digest(line.format("words")) != digest("pass")


@pytest.mark.parametrize("line", ["x = {!r}", "f({!r})", "x.append({!r})", "raise Stop from f({!r})", "f(mode={!r})"])
def test_other_strings_count(digest: Callable[..., str], line: str) -> None:
    assert digest(line.format("one")) != digest(line.format("another"))


def test_comments_of_c_and_yaml_do_not_count_either(digest: Callable[..., str]) -> None:
    original = digest('int f() { return puts("// kept"); }\n', "a.cpp")
    assert original == digest('/* what\n f does */ int f() { return   puts("// kept"); } // end\n', "a.cpp")
    assert original != digest('int f() { return puts("// other"); }\n', "a.cpp")
    assert digest("a: 1 # one\nb: [2]\n", "a.yaml") == digest("b:\n  - 2\na: 1\n", "a.yaml")
    assert digest("a: 1\n", "a.yaml") != digest("a: 2\n", "a.yaml")


def test_a_file_that_is_no_python_counts_as_it_stands(digest: Callable[..., str]) -> None:
    assert digest("def (") != digest("def ( # a comment")


def test_the_place_of_a_file_counts(digest: Callable[..., str]) -> None:
    assert digest("x = 1\n", "a.py") != digest("x = 1\n", "b.py")


# --- what a stage can reach ---


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """What the first of these modules can reach; its packages of others are those with a capital letter."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)

    def of(sources: dict[str, str], left_out: Callable[[str], bool] = lambda name: False) -> set[str]:
        for name, text in sources.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        found = closure.closure("m1.first", left_out)
        return {*found.modules, *(name.upper() for name in found.packages)}

    return of


def test_imports_of_every_form_are_followed(modules: Callable[..., set[str]]) -> None:
    reached = modules(
        {
            "m1/first.py": "import os, numpy.linalg\nimport m1.second\nfrom . import third\n",
            "m1/second.py": "def f():\n    from m1.part.inner import value\n",
            "m1/third.py": "from .part import thing\nfrom yaml import *\n",
            "m1/part/__init__.py": "thing = 1\n",
            "m1/part/inner.py": "from ..fourth import x\n",
            "m1/fourth.py": "x = 1\n",
            "m1/apart.py": "",
        }
    )
    inside = {"m1.first", "m1.second", "m1.third", "m1.part", "m1.part.inner", "m1.fourth"}
    assert reached == {*inside, "NUMPY", "YAML"}


def test_imports_for_type_checkers_do_not_count(modules: Callable[..., set[str]]) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import m1.second\nelse:\n    import m1.third\n"
    assert modules({"m1/first.py": text, "m1/second.py": "", "m1/third.py": ""}) == {"m1.first", "m1.third"}


def test_modules_that_are_left_out_are_not_entered(modules: Callable[..., set[str]]) -> None:
    sources = {"m1/first.py": "import m1.second", "m1/second.py": "import m1.third", "m1/third.py": ""}
    assert modules(sources, lambda name: name == "m1.second") == {"m1.first"}


def test_circles_of_imports_end(modules: Callable[..., set[str]]) -> None:
    assert modules({"m1/first.py": "import m1.second", "m1/second.py": "import m1.first"}) == {"m1.first", "m1.second"}


# --- the stages there are ---


@pytest.mark.parametrize("name", stages())
def test_every_stage_names_code_that_exists_and_its_own_module(name: str) -> None:
    record, tiny = stage(name), profile.load("tiny")
    module = closure.source_of(record.module)
    assert module is not None and closure.source_of(f"{record.package}.__main__") is not None
    functions = {node.name for node in ast.parse(module.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert record.run.partition(":")[2] in functions
    assert set(identities.settings_of(record, tiny)) == {name, *record.settings}
    reached, _ = identities.modules_of(record, tiny)
    assert record.module in reached
    # The work alone: an edit of what a stage says of itself, or of how runs are looked at, makes nothing anew.
    assert not {each for each in reached if each.startswith(("m1.tracking", "m1.cli", "flows", "m1.run"))}
    others = {each.package for each in stages().values()} - {record.package}
    assert not {each for each in reached if each.rpartition(".")[0] in others}, "no stage imports another"


@pytest.mark.parametrize("name", profile.available())
def test_what_dvc_watches_holds_all_that_counts(name: str) -> None:
    """A plan goes by code that counts for a profile, DVC by files and folders that hold for every profile."""
    settings = profile.load(name)
    for record in (stage(each) for each in settings.order):
        watched = identities.all_code_of(record)
        files = identities.files_of(identities.modules_of(record, settings)[0])
        missed = [file for file in files if not any(file.is_relative_to(each) for each in watched)]
        assert not missed, record.name
        assert all(each.exists() for each in watched)
        specs = [paths.ROOT / each for each in record.spec_paths]
        assert all(any(file.is_relative_to(each) for each in specs) for file in record.files(settings))


def test_patterns_of_what_has_no_effect_name_modules_that_there_are() -> None:
    """A pattern that fits nothing is a module that was renamed, and counts again without anybody having said so."""
    files = [file for top in closure.OURS for file in (paths.ROOT / top).rglob("*.py")]
    names = [".".join(file.relative_to(paths.ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    for pattern in identities.WITHOUT_EFFECT:
        assert any(fnmatch.fnmatchcase(name, pattern) for name in names), pattern
    for module, folder in identities.RESOURCES.items():
        assert module in names and any((paths.ROOT / folder).iterdir())
