"""Draw the held-out prompts for evaluation and the training prompts for reinforcement learning.

Both are disjoint by content from each other and from the SFT data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m1 import paths
from m1.profile import Profile
from m1.stage import data_main
from stages.synthesize.tasks.draw import check_tasks, draw, read_ids, row, tally, write_rows


def run(settings: Profile, output: Path) -> dict[str, Any]:
    """Write `heldout.jsonl` and `train.jsonl` into `output`.

    Raises:
        UsageError: unknown task, SFT data missing, or too few different problems.
    """
    section = settings.synthesize
    check_tasks(section.tasks, "synthesize")
    sft = paths.data_dir(settings.name, "sft-data")
    taken = read_ids(sft / "train.jsonl") | read_ids(sft / "heldout.jsonl")
    # Held-out first: its problems then do not depend on how many training prompts are asked for.
    counts = {"heldout": section.heldout_prompts_per_task, "train": section.train_prompts_per_task}
    summary: dict[str, Any] = {"sft_ids": len(taken)}
    for split, per_task in counts.items():
        purpose = f"synthesize/{split}"
        problems = draw(section.tasks, per_task, seed=settings.seed, purpose=purpose, taken=taken)
        write_rows(output / f"{split}.jsonl", [row(problem, with_response=False) for problem in problems])
        summary[split] = {"rows": len(problems), "by_task_and_difficulty": tally(problems)}
    if section.swe is not None:
        from stages.synthesize.swe import make_swe  # only this part needs the sandbox's packages

        summary |= make_swe(settings, section.swe, output)
    return summary


if __name__ == "__main__":
    data_main(run)
