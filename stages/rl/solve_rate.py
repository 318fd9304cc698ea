"""Which prompts are still worth training on: estimated with the parent before rl-80k (MiniMax-M1 report §5)."""

from __future__ import annotations

import json
from collections.abc import Sequence

from m1.config.rl import Rl
from m1.errors import UsageError
from m1.files import write_json
from m1.run.contract import StageContext
from m1.tasks.prompts import Prompt
from stages.rl.rollouts import RolloutWorker
from stages.rl.sampling import PromptSampler
from stages.rl.state import State

#: Responses per prompt from which its solve rate is estimated.
SAMPLES = 4


def drop_easy_prompts(
    context: StageContext[Rl], worker: RolloutWorker, prompts: Sequence[Prompt], seed: str, state: State
) -> list[Prompt]:
    """The prompts that the present weights solve at a rate of at most `max_solve_rate`; a note says how many go.

    Only as many prompts as the stage can use are tried, in the sampler's order. The estimate is stored in the run
    folder and read back from there, so that a continued run, whose weights have moved on, trains on the same prompts.

    Raises:
        UsageError: fewer prompts are left than one step needs.
        StopRequested: on every rank.
    """
    section = context.section
    assert section.max_solve_rate is not None
    needed = section.train_steps * section.prompts_per_step * section.max_generation_rounds
    tried = [prompt for _, prompt in PromptSampler(prompts, seed).take(min(needed, len(prompts)))]
    rates = _rates(context, worker, tried)
    kept = [prompt for prompt in tried if rates[prompt.row.id] <= section.max_solve_rate]
    if len(kept) < section.prompts_per_step:
        raise UsageError(
            f"only {len(kept)} of {len(tried)} prompts are solved at most at max_solve_rate={section.max_solve_rate}, "
            f"a step needs {section.prompts_per_step}",
            "Raise max_solve_rate, or synthesise harder prompts.",
        )
    state.note(
        f"{len(tried) - len(kept)} of {len(tried)} prompts dropped: the parent solves them at a rate above "
        f"{section.max_solve_rate} ({SAMPLES} samples each)"
    )
    return kept


def _rates(context: StageContext[Rl], worker: RolloutWorker, tried: Sequence[Prompt]) -> dict[str, float]:
    """Share of right responses by id of the prompt."""
    file = context.output / "solve_rate.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    groups = worker.roll_out(list(enumerate(tried)), context.section.windows[0], SAMPLES)
    rates = {group.prompt.row.id: sum(r.correct for r in group.rewards) / len(group.rewards) for group in groups}
    # No rank can still be looking for the file: all have taken part in the rollouts.
    if context.rank == 0:
        write_json(file, rates)
    return rates
