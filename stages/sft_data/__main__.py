"""Draw problems with worked answers for supervised fine-tuning: a training set and a small set to measure loss on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m1 import chat
from m1.errors import UsageError
from m1.profile import Profile
from m1.stage import data_main
from stages.synthesize.tasks import Problem
from stages.synthesize.tasks.draw import check_tasks, draw, row, tally, write_rows

EMPTY_THINK = chat.THINK_OPEN + chat.THINK_CLOSE
#: Share of the samples on which the loss is only measured.
HELDOUT_FRACTION = 0.02


def run(settings: Profile, output: Path) -> dict[str, Any]:
    """Write `train.jsonl` and `heldout.jsonl` into `output`; together they are `samples_per_task` of every task.

    Raises:
        UsageError: unknown task, or too few different problems.
    """
    section = settings.sft_data
    check_tasks(section.tasks, "sft-data")
    if section.samples_per_task < 2:
        raise UsageError("sft-data.samples_per_task=1 leaves nothing to hold out", "Ask for at least 2.")
    heldout = max(1, round(section.samples_per_task * HELDOUT_FRACTION))
    counts = {"heldout": heldout, "train": section.samples_per_task - heldout}
    taken: set[str] = set()
    summary: dict[str, Any] = {}
    for split, per_task in counts.items():
        problems = draw(section.tasks, per_task, seed=settings.seed, purpose=f"sft-data/{split}", taken=taken)
        rows = [_sample(problem, section.direct_fraction) for problem in problems]
        write_rows(output / f"{split}.jsonl", rows)
        direct = sum(sample["response"].startswith(EMPTY_THINK) for sample in rows)
        summary[split] = {"rows": len(rows), "direct": direct, "by_task_and_difficulty": tally(problems)}
    return summary


def _sample(problem: Problem, direct_fraction: float) -> dict[str, Any]:
    """A problem with its response: worked, or for a share of the problems (fixed by their content) the bare answer."""
    sample = row(problem, with_response=True)
    if int(sample["id"], 16) / 16 ** len(sample["id"]) < direct_fraction:
        sample["response"] = chat.render_response("", f" {sample['answer']}")
    return sample


if __name__ == "__main__":
    data_main(run)
