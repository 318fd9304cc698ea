"""Software-engineering tasks from real packages: made with faults that tests find, judged by those tests in a sandbox.

The work is in `making` and `judging`, imported only where it is done: every command that reads a profile imports this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from m1.config.evaluate import Evaluate
from m1.config.families import SwePrompts, SweTasks
from m1.config.profile import Profile
from m1.config.rl import Rl
from m1.config.synthesize import Synthesize
from m1.run.stage import Need
from m1.tasks.base import Judge, Made, Setting, TaskFamily, Wish


class SweFamily(TaskFamily):
    """Repair a fault, find it, or write a test that fails because of it."""

    name = "swe"
    about = "Faults in real packages: repair them, locate them, or write the test that finds them."
    need = Need.SANDBOX

    @property
    def ends(self) -> tuple[str, ...]:
        from m1.tasks.swe.reward import ENDS

        return ENDS

    def make(self, wish: Wish) -> Made:
        """The questions of a split, and the set of tasks they belong to; see `making.make`."""
        from m1.tasks.swe import making

        return making.make(wish)

    @contextlib.contextmanager
    def judge(self, setting: Setting) -> Iterator[Judge]:
        """One sandbox for each environment of the set; see `judging.opened`."""
        from m1.tasks.swe import judging

        with judging.opened(setting) as judge:
            yield judge

    def is_required(self, profile: Profile) -> bool:
        section = _section(profile)
        return section is not None and section.when_no_engine == "fail"

    def rules(self, profile: Profile, stage: str) -> tuple[str, ...]:
        """A stage that asks such tasks needs `synthesize.swe`, and questions and answers must fit."""
        return tuple(_rules_of(profile, stage))

    def modules(self, profile: Profile, stage: str) -> tuple[str, ...]:
        return ("m1.tasks.swe.making",) if stage == "synthesize" else ("m1.tasks.swe.judging",)


def _section(profile: Profile) -> SweTasks | None:
    made = profile.find("synthesize", Synthesize)
    return made.swe if made else None


def _rules_of(profile: Profile, stage: str) -> Iterator[str]:
    rl, evaluate = profile.find(stage, Rl), profile.find(stage, Evaluate)
    part: SwePrompts | None = rl.swe if rl else evaluate.swe if evaluate else None
    if part is None:
        return
    window = rl.windows[-1] if rl else evaluate.asked()["swe"].max_new_tokens if evaluate else 0
    made, limit, most = _section(profile), part.max_prompt_length, profile.model.max_position_embeddings
    if made is None:
        yield f"{stage}.swe: no such tasks are made; give synthesize.swe a value, or remove {stage}.swe"
    elif limit < made.question_length:
        yield (
            f"{stage}.swe.max_prompt_length={limit} is below synthesize.swe.question_length={made.question_length}: "
            "hardly a question would fit; raise the one or lower the other"
        )
    if limit + window > most:
        yield (
            f"{stage}.swe.max_prompt_length={limit} with {window} tokens of answer exceeds "
            f"model.max_position_embeddings={most}"
        )


FAMILY = SweFamily()
