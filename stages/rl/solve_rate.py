"""Which prompts are still worth training on: estimated with the parent before rl-80k (MiniMax-M1 report §5)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch.distributed

from m1.errors import UsageError
from m1.profile import Rl
from m1.stage import write_json
from stages.evaluate.prompts import Prompt
from stages.rl.rollouts import RolloutWorker
from stages.rl.sampling import PromptSampler

#: Responses per prompt from which its solve rate is estimated.
SAMPLES = 4


def drop_easy_prompts(
    worker: RolloutWorker, prompts: Sequence[Prompt], section: Rl, seed: str, file: Path
) -> tuple[list[Prompt], str]:
    """The prompts that the present weights solve at a rate of at most `max_solve_rate`, and a sentence on it.

    Only as many prompts as the stage can use are tried, in the sampler's order. The estimate is stored in `file`
    and read back from there, so that a continued run, whose weights have moved on, trains on the same prompts.

    Raises:
        UsageError: fewer prompts are left than one step needs.
    """
    assert section.max_solve_rate is not None
    needed = section.train_steps * section.prompts_per_step * section.max_generation_rounds
    tried = [prompt for _, prompt in PromptSampler(prompts, seed).take(min(needed, len(prompts)))]
    if file.is_file():
        rates = json.loads(file.read_text())
    else:
        groups = worker.roll_out(list(enumerate(tried)), section.windows[0], SAMPLES)
        rates = {g.prompt.row["id"]: sum(r.correct for r in g.rewards) / len(g.rewards) for g in groups}
        # No rank can still be looking for the file: all have taken part in the rollouts.
        if torch.distributed.get_rank() == 0:
            write_json(file, rates)
    kept = [prompt for prompt in tried if rates[prompt.row["id"]] <= section.max_solve_rate]
    if len(kept) < section.prompts_per_step:
        raise UsageError(
            f"only {len(kept)} of {len(tried)} prompts are solved at most at max_solve_rate={section.max_solve_rate}, "
            f"a step needs {section.prompts_per_step}",
            "Raise max_solve_rate, or synthesise harder prompts.",
        )
    return kept, (
        f"{len(tried) - len(kept)} of {len(tried)} prompts dropped: the parent solves them at a rate above "
        f"{section.max_solve_rate} ({SAMPLES} samples each)"
    )
