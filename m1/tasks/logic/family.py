"""Generated problems that a rule judges."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from m1.config.profile import Profile
from m1.config.sft_data import SftData
from m1.config.synthesize import Synthesize
from m1.tasks.base import Judge, Made, Setting, TaskFamily, Wish
from m1.tasks.logic import TASKS, making, module_of
from m1.tasks.logic.draw import unknown_tasks
from m1.tasks.logic.judging import RuleJudge


class LogicFamily(TaskFamily):
    """Problems of the generators in `m1.tasks.logic.tasks`."""

    name = "logic"
    about = "Generated problems of logic, counting and order, judged by rule."
    works_answers = True

    def make(self, wish: Wish) -> Made:
        """See `making.make`."""
        return making.make(wish)

    @contextlib.contextmanager
    def judge(self, setting: Setting) -> Iterator[Judge]:
        yield RuleJudge()

    def rules(self, profile: Profile, stage: str) -> tuple[str, ...]:
        """Tasks are named in the sections that make them; stages that ask them take what was made."""
        section = profile.find(stage, SftData) or profile.find(stage, Synthesize)
        return tuple(unknown_tasks(section.tasks, f"{stage}.tasks")) if section else ()

    def modules(self, profile: Profile, stage: str) -> tuple[str, ...]:
        section = profile.find(stage, SftData) or profile.find(stage, Synthesize)
        work = "m1.tasks.logic.making" if section else "m1.tasks.logic.judging"
        tasks = (section or profile.section("synthesize", Synthesize)).tasks
        return (work, *(module_of(name) for name in sorted(tasks) if name in TASKS))


FAMILY = LogicFamily()
