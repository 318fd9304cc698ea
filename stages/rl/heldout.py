"""The periodic check during reinforcement learning: pass@1 on held-out prompts of the plain family."""

from __future__ import annotations

from m1.config.families import PLAIN
from m1.config.rl import Rl
from m1.rollout.engine import RolloutEngine, Sampling
from m1.run.contract import StageContext
from m1.run.stop_signal import StopSignal
from m1.tasks.asking import Pool
from m1.tasks.logic.judging import RuleJudge
from m1.tasks.pass_rate import accuracy_by_task, evaluate_prompts
from m1.tasks.prompts import read_rows, tokenised
from m1.tokenizer import Tokenizer
from stages.rl.state import State

#: Responses to each prompt.
SAMPLES = 4
#: Their nucleus, as in the report's evaluation (§6); the temperature is 1 there, too.
TOP_P = 0.95


class HeldOut:
    """Measures the present weights where it is due."""

    def __init__(
        self, context: StageContext[Rl], engine: RolloutEngine, tokenizer: Tokenizer, stop: StopSignal
    ) -> None:
        self.context, self.engine, self.tokenizer, self.stop = context, engine, tokenizer, stop
        rows = read_rows(context.data["synthesize"] / "heldout.jsonl")
        prompts = tokenised([row for row in rows if row.family == PLAIN], tokenizer)
        self.pool = Pool(PLAIN, prompts, RuleJudge())
        self.prompts = self.pool.limited(context.section.evaluate_prompts_per_task)

    def measure_if_due(self, state: State) -> None:
        """Log pass@1 and keep it in the state, unless it is not due or was measured before an interruption.

        Raises:
            StopRequested: on every rank.
        """
        section, step = self.context.section, state.step
        due = step % section.evaluate_every == 0 or step == section.train_steps
        if not due or step in [measured for measured, _ in state.heldout]:
            return
        answered = evaluate_prompts(
            self.engine,
            self.tokenizer,
            self.pool,
            self.prompts,
            Sampling(section.windows[-1], top_p=TOP_P),
            samples=SAMPLES,
            seed=f"{self.context.profile.seed}/heldout",
            stop=self.stop,
        )
        accuracy = {task: entry.value or 0.0 for task, entry in accuracy_by_task(answered).items()}
        state.heldout.append((step, accuracy))
        self.context.log_metrics(step, {f"heldout/pass@1/{task}": value for task, value in accuracy.items()})
