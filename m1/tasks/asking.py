"""What a stage asks a model: the prompts of every family, with the judge of the responses."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from m1.config.families import FamilyPrompts
from m1.errors import UsageError
from m1.run.contract import StageContext
from m1.run.stage import Demand
from m1.tasks.base import Judge, Row, Setting, Split, Tools
from m1.tasks.families import family
from m1.tasks.prompts import Prompt, first_of_each_task, read_rows, tokenised
from m1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pool:
    """The prompts of one family.

    Attributes:
        ends: the values that `Verdict.end` can have, if the family uses it.
    """

    family: str
    prompts: list[Prompt]
    judge: Judge
    ends: tuple[str, ...] = ()

    def limited(self, per_task: int) -> list[Prompt]:
        """The first `per_task` prompts of every task."""
        return first_of_each_task(self.prompts, per_task)


@dataclass(frozen=True)
class Asked:
    """The pools by family, in the order of the section, and sentences for the report.

    Attributes:
        notes: on every family but the plain one: how many of its prompts are used, or why none is.
        left_out: those of the notes that tell of a family left out.
    """

    pools: Mapping[str, Pool]
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@contextlib.contextmanager
def opened(
    context: StageContext,
    split: Split,
    tokenizer: Tokenizer,
    wanted: Mapping[str, FamilyPrompts],
    demands: Mapping[str, Demand],
    tools: Tools,
) -> Iterator[Asked]:
    """Open the judges of the families that a stage asks; none is left open when the context ends.

    Every rank takes part, in a process group.

    Args:
        wanted: how each family is asked.
        demands: what families need, for the sentence on one that is left out.

    Raises:
        UsageError: a family has no prompt that is short enough.
        ServiceError: what a family needs was there when the stage was planned and fails now.
    """
    folder = context.data["synthesize"]
    rows = read_rows(folder / f"{split}.jsonl", "Make the set again: `prefect deployment run m1/synthesize`.")
    pools: dict[str, Pool] = {}
    notes: list[str] = []
    left_out: list[str] = []
    with contextlib.ExitStack() as stack:
        for name, part in wanted.items():
            mine = [row for row in rows if row.family == name]
            if name in context.request.left_out or (name in demands and not mine):
                left_out.append(_left_out(context, name, split, demands[name]))
                notes.append(left_out[-1])
                continue
            prompts = _prompts(context, name, mine, tokenizer, part)
            if name in demands:
                notes.append(
                    f"{name}: {len(prompts)} of {len(mine)} prompts have at most {part.max_prompt_length} tokens"
                )
            setting = Setting(context.profile, folder, part, context.rank, tools)
            judge = stack.enter_context(family(name).judge(setting))
            pools[name] = Pool(name, prompts, judge, family(name).ends)
        yield Asked(pools, tuple(notes), tuple(left_out))


def _prompts(
    context: StageContext, name: str, rows: Sequence[Row], tokenizer: Tokenizer, part: FamilyPrompts
) -> list[Prompt]:
    prompts = tokenised(rows, tokenizer, part.max_prompt_length)
    if not prompts:
        raise UsageError(
            f"{context.stage}: none of the {len(rows)} prompts of family {name} has at most max_prompt_length="
            f"{part.max_prompt_length} tokens",
            "Raise max_prompt_length.",
        )
    if family(name).need is not None:  # such a file may have one source after the other
        random.Random(f"{context.profile.seed}/{name}").shuffle(prompts)
    return prompts


def _left_out(context: StageContext, name: str, split: Split, demand: Demand) -> str:
    if name in context.request.left_out:
        why = f"no {demand.need.value}" if demand.need.value != "sandbox" else _NO_ENGINE
    else:
        why = (
            f"the set has no task of the {split} split: synthesize left them out, or synthesize.{name} names no source "
            "for it"
        )
    sentence = f"{name}: skipped: {why}"
    if context.rank == 0:
        print(f"{context.stage}: {sentence}", flush=True)
    return sentence


_NO_ENGINE = "no engine; infra/sandbox/engine.sh starts one"
