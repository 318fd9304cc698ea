"""Make the held-out tasks for evaluation and the training tasks for reinforcement learning.

Both are disjoint by content from each other and from the data of the cold start.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import JsonValue

from infra import tools
from m1 import paths
from m1.config.families import PLAIN
from m1.config.profile import Profile
from m1.config.synthesize import Synthesize
from m1.errors import UsageError
from m1.files import read_rows, write_rows
from m1.run.contract import Summary
from m1.run.resolve import families_left_out
from m1.tasks.base import Made, Split, Wish
from m1.tasks.families import demands, family

#: Held out first: its tasks then do not depend on how many are trained on.
SPLITS: tuple[Split, ...] = ("heldout", "train")


def run(profile: Profile, output: Path) -> Summary:
    """Write `heldout.jsonl` and `train.jsonl` into `output`, the rows of every family one after the other.

    Raises:
        UsageError: data of the cold start missing, or too few different problems.
        ServiceError: what a family needs is missing, and the profile does not allow leaving it out.
    """
    names = profile.section("synthesize", Synthesize).families()
    without = families_left_out(demands(profile, names), tools.missing)
    taken = _ids_of_cold_start(profile)
    summary: Summary = {"sft_ids": len(taken)}
    made: dict[str, dict[Split, Made]] = {name: {} for name in names}
    for split in SPLITS:
        for name in names:
            if any(part.left_out and not part.rows for part in made[name].values()):
                made[name][split] = Made([])  # for the same reason as the other split, which has been reported
                continue
            wish = Wish(profile, "synthesize", split, output, taken, None if name in without else tools.Tools())
            made[name][split] = family(name).make(wish)
        rows = [row.to_json() for name in names for row in made[name][split].rows]
        write_rows(output / f"{split}.jsonl", rows, sort_keys=True)
    for name, parts in made.items():
        told: Summary = {split: part.summary for split, part in parts.items() if part.summary}
        if told:
            summary |= told if name == PLAIN else {name: told}
    if sentences := list(dict.fromkeys(_sentences(made.values()))):
        summary |= {"notes": list[JsonValue](sentences), "left_out": list[JsonValue](sentences)}
    return summary


def _ids_of_cold_start(profile: Profile) -> set[str]:
    hint = f"Make it again: python -m stages.sft_data --profile {profile.name}."
    ids: set[str] = set()
    for split in SPLITS:
        file = paths.data_dir(profile.name, "sft-data") / f"{split}.jsonl"
        try:
            ids |= {str(row["id"]) for row in read_rows(file, hint)}
        except KeyError:
            raise UsageError(f"{file} is damaged: a row has no id", hint) from None
    return ids


def _sentences(families: Iterable[dict[Split, Made]]) -> Iterable[str]:
    return (sentence for parts in families for part in parts.values() for sentence in part.left_out)
