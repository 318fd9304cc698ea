"""The attack suite against this engine: nothing wins, everything has a verdict, and the next job is right.

The attacks are data in `infra.sandbox.attacks`; `m1 sandbox attack` runs the same ones by the same code. Of the group
`text` only those that reach the engine are here: tests/swe/test_answers.py has all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infra.sandbox import Sandbox
from infra.sandbox.attacks import forgeries, suite
from m1.errors import UsageError
from m1.tasks.swe.reward import judge_repair


@pytest.fixture(scope="module")
def engine(image: str) -> Iterator[Sandbox]:
    with Sandbox(image, warm=2, limits=suite.LIMITS) as made:
        yield made


def test_honest_answers_are_judged_right(engine: Sandbox) -> None:
    """Without this, a judge that refuses everything would contain every attack."""
    assert suite.honest(engine) == []


TRIED = [*suite.chosen(["job", "forgery", "written-test"]), *suite.chosen(["text"], "sandbox's own")]


@pytest.mark.parametrize("attack", TRIED, ids=lambda attack: f"{attack.group}: {attack.name}")
def test_contained(engine: Sandbox, attack: suite.Attack) -> None:
    found = suite.finding(engine, attack)
    assert found.contained, found.verdict
    assert found.next_job


@pytest.mark.parametrize("attack", suite.chosen(["informed"]), ids=lambda attack: attack.name)
def test_informed_attacks_leave_the_engine_well(engine: Sandbox, attack: suite.Attack) -> None:
    """What they win is measured and written down in docs/sandbox.md."""
    assert suite.finding(engine, attack).next_job


def test_forged_outcomes_of_a_single_run_do_not_stand(engine: Sandbox) -> None:
    """One test has no copies of its kind to hide behind; it is looked at in other shapes all the same."""
    one = forgeries.TASK.model_copy(update={"fail_to_pass": ("tests/test_b.py::test_later",)})
    code = forgeries.FORGERIES["only tests that call the code"]
    judged = judge_repair(engine, one, forgeries.FAULTY, forgeries.KEPT, forgeries.answer(code), limits=suite.LIMITS)
    assert judged.value == 0.0, judged


def test_what_is_not_an_attack_is_refused() -> None:
    with pytest.raises(UsageError, match="no such group"):
        suite.chosen(["gossip"])
    with pytest.raises(UsageError, match="no attack"):
        suite.chosen(None, "no such word")
