"""The stage `sft-data`."""

from __future__ import annotations

from m1.config.profile import Profile
from m1.config.sft_data import SftData
from m1.run.stage import Kind, Stage
from m1.tasks import families


def _rules(profile: Profile) -> tuple[str, ...]:
    few = profile.section("sft-data", SftData).samples_per_task < 2
    held_out = ("sft-data.samples_per_task=1 leaves nothing to hold out; ask for at least 2",) if few else ()
    return (*held_out, *families.rules(profile, families.that_work_answers(), "sft-data"))


STAGES = (
    Stage(
        name="sft-data",
        about="Task generators write questions with worked answers.",
        kind=Kind.DATA,
        section=SftData,
        run="stages.sft_data.run:run",
        settings=("seed",),
        rules=_rules,
        plugins=lambda profile: families.modules(profile, families.that_work_answers(), "sft-data"),
        loads=("m1.tasks.logic",),
    ),
)
