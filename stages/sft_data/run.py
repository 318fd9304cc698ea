"""Draw tasks with worked answers for supervised fine-tuning: a training set and a small set to measure loss on."""

from __future__ import annotations

from pathlib import Path

from m1.config.profile import Profile
from m1.files import write_rows
from m1.run.contract import Summary
from m1.tasks.base import Split, Wish
from m1.tasks.families import family, that_work_answers

#: Held out first, so that its tasks do not depend on how many are trained on.
SPLITS: tuple[Split, ...] = ("heldout", "train")


def run(profile: Profile, output: Path) -> Summary:
    """Write `train.jsonl` and `heldout.jsonl` into `output`; together they are `samples_per_task` of every task.

    Raises:
        UsageError: too few different problems.
    """
    taken: set[str] = set()
    summary: Summary = {}
    for split in SPLITS:
        made = [family(name).make(Wish(profile, "sft-data", split, output, taken)) for name in that_work_answers()]
        write_rows(output / f"{split}.jsonl", [row.to_json() for part in made for row in part.rows], sort_keys=True)
        summary[split] = made[0].summary
    return summary
