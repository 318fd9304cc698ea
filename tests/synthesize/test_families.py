"""The task families: that each is whole, and what stages learn of them by name."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from m1 import paths
from m1.config.families import PLAIN, FamilyPrompts, FamilyTasks, named
from m1.config.profile import Profile
from m1.config.synthesize import Synthesize
from m1.errors import UsageError
from m1.run import profiles
from m1.run.registry import stage, stages
from m1.run.stage import Demand, Need
from m1.tasks import families
from m1.tasks.base import TaskFamily
from m1.tasks.families import family

#: Stages that make tasks, and those that ask them.
MAKE, ASK = ("sft-data", "synthesize"), ("rl-40k", "rl-80k", "evaluate")
NAMES = tuple(sorted(path.parent.name for path in (paths.ROOT / "m1" / "tasks").glob("*/family.py")))
#: Every family is asked everywhere.
EVERYTHING = {
    "synthesize.swe": {"faults_per_package": 2, "question_length": 300},
    "rl-40k.swe": {"share": 0.5, "max_prompt_length": 340},
    "rl-80k.swe": {"share": 0.25, "max_prompt_length": 340},
    "evaluate.swe": {"tasks_per_kind": 2, "max_prompt_length": 340},
}


@pytest.fixture(scope="module")
def asking() -> Profile:
    return profiles.load("smoke", overrides=EVERYTHING)


def makes(name: str, at: str) -> bool:
    """Whether a stage makes or asks tasks of the family: data for the cold start needs worked answers."""
    return at != "sft-data" or name in families.that_work_answers()


def test_every_package_with_a_family_is_registered() -> None:
    assert tuple(sorted(families._MODULES)) == NAMES and PLAIN in NAMES and "swe" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_whole(name: str) -> None:
    found = family(name)
    assert isinstance(found, TaskFamily) and found.name == name and found.about.endswith(".")
    assert family(name) is found, "one of each"
    for work in ("making", "judging"):
        module = importlib.import_module(f"m1.tasks.{name}.{work}")
        assert module.__doc__ and Path(str(module.__file__)).parent.name == name
    assert callable(importlib.import_module(f"m1.tasks.{name}.making").make)
    assert all(isinstance(end, str) and end for end in found.ends) and len(set(found.ends)) == len(found.ends)


@pytest.mark.parametrize("name", NAMES)
def test_modules_that_are_loaded_by_name_can_be_imported(name: str, asking: Profile) -> None:
    for at in (*MAKE, *ASK):
        if not makes(name, at):
            continue
        work = "making" if at in MAKE else "judging"
        modules = families.modules(asking, [name], at)
        assert modules[0] == f"m1.tasks.{name}.{work}" and len(set(modules)) == len(modules)
        for module in modules:
            assert importlib.import_module(module).__name__ == module
        assert set(modules) <= set(stage(at).plugins(asking)), "its code is part of the stage's identity"
        for module in modules:
            assert any(module.startswith(f"{loads}.") for loads in stage(at).loads), "DVC watches all of its package"


def test_the_plain_familys_tasks_are_modules_of_their_own(asking: Profile) -> None:
    tasks = sorted(asking.section("synthesize", Synthesize).tasks)
    assert tasks == ["arithmetic", "dyck_language"]
    for at in (*MAKE, *ASK):
        assert families.modules(asking, [PLAIN], at)[1:] == tuple(f"m1.tasks.logic.tasks.{task}" for task in tasks)


def test_a_profile_names_only_families_that_there_are(asking: Profile) -> None:
    """A field of a section that says how a family is made or asked carries the name of one."""
    seen = set()
    for name, record in stages().items():
        section = asking.find(name, record.section)
        assert section is not None
        for kind in (FamilyTasks, FamilyPrompts):
            seen |= {(name, each) for each in named(section, kind)}
    assert seen == {(name, "swe") for name in ("synthesize", *ASK)} and {each for _, each in seen} <= set(NAMES)
    assert asking.section("synthesize", Synthesize).families() == (PLAIN, "swe")


def test_what_families_need_is_demanded_by_the_stages_that_ask_them(asking: Profile) -> None:
    plain = profiles.load("smoke")
    for name in ("synthesize", *ASK):
        assert stage(name).demands(plain) == {}
        assert stage(name).demands(asking) == {"swe": Demand(Need.SANDBOX)}
        assert "infra.sandbox" in stage(name).plugins(asking) and "infra.sandbox" not in stage(name).plugins(plain)
    strict = profiles.load("smoke", overrides={**EVERYTHING, "synthesize.swe.when_no_engine": "fail"})
    assert stage("rl-40k").demands(strict) == {"swe": Demand(Need.SANDBOX, required=True)}
    assert stage("sft-data").demands(strict) == {} and families.that_work_answers() == (PLAIN,)


@pytest.mark.parametrize("section", MAKE)
def test_tasks_that_nobody_generates_are_refused_where_they_are_made(section: str, asking: Profile) -> None:
    assert families.rules(asking, [PLAIN], section) == ()
    with pytest.raises(UsageError) as refused:
        profiles.load("smoke", overrides={f"{section}.tasks": {"dick_language": {"max_difficulty": 1}}})
    assert f"{section}.tasks: there is no task 'dick_language'; did you mean dyck_language?" in str(refused.value)
    broken = asking.model_copy(
        update={
            section.replace("-", "_"): asking.section(section, stage(section).section).model_copy(update={"tasks": {}})
        }
    )
    (clause,) = families.rules(broken, [PLAIN], section)
    assert clause.startswith(f"{section}.tasks is empty; name at least one of arithmetic, boolean_expressions")


def test_stages_that_ask_have_no_tasks_to_misspell(asking: Profile) -> None:
    for name in ASK:
        assert families.rules(asking, NAMES, name) == ()
