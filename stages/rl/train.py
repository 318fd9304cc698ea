"""The reinforcement-learning loop (MiniMax-M1 report §3 to §5)."""

from __future__ import annotations

import time

from infra.tools import Tools
from m1.config.families import PLAIN
from m1.config.rl import Rl
from m1.rollout.recurrent import RecurrentEngine
from m1.run.contract import StageContext, StageResult
from m1.tasks.asking import Asked, opened
from m1.tasks.families import demands
from m1.tokenizer import Tokenizer, load_tokenizer
from m1.training import loop, parallel
from m1.training.saving import Saver
from m1.training.trainer import Trainer
from stages.rl import figures, report
from stages.rl.heldout import HeldOut
from stages.rl.rollouts import RolloutWorker, family_metrics, rollout_metrics, write_rollouts
from stages.rl.sampling import MixedSampler, PromptSampler, SampledBatch, dynamic_sampling
from stages.rl.solve_rate import drop_easy_prompts
from stages.rl.state import State
from stages.rl.updates import add_old_logprobs, plan_updates, update
from stages.rl.windows import WindowSchedule


def run(context: StageContext[Rl]) -> StageResult:
    """Train the parent with the profile's objective; `rl-40k` and `rl-80k` differ in their section alone.

    A checkpoint keeps the step, the prompts' cursor, the windows' schedule and what was measured; learning rate and
    random numbers of the rollouts are functions of them. SIGTERM abandons rollouts; the state is that before the step.
    """
    loop.start(context)
    tokenizer = load_tokenizer(context.data["tokenizer"])
    families = {name: part.prompts for name, part in context.section.asked().items()}
    with opened(context, "train", tokenizer, families, demands(context.profile, families), Tools()) as asked:
        result = train(context, tokenizer, asked)
    parallel.shutdown()
    return result


def train(context: StageContext[Rl], tokenizer: Tokenizer, asked: Asked) -> StageResult:
    """Roll out, judge, update; every step of the stage in turn."""
    profile, section = context.profile, context.section
    seed = f"{profile.seed}/{context.stage}"  # the second stage does not meet the prompts in the first's order again
    trainer = Trainer(
        profile.model,
        profile.parallel,
        seed=profile.seed,
        optimizer=section.optimizer,
        moe_aux_loss_coeff=section.moe_aux_loss_coeff,
    )
    saver = Saver(context, trainer)
    state = State.resumed(saver)
    if state is None:
        trainer.load(context.parent_checkpoint(), optimizer=False)
        state = State(notes=list(asked.notes))
    engine = RecurrentEngine(trainer.model, tokenizer.eos_id)
    engine.update_weights(state.step)
    worker = RolloutWorker(engine, tokenizer, asked.pools, section, seed, saver.stop)
    heldout = HeldOut(context, engine, tokenizer, saver.stop)
    schedule = WindowSchedule.resumed(section.windows, section.advance, state.schedule)
    with state.kept_when_stopped(saver):
        prompts = {name: pool.prompts for name, pool in asked.pools.items()}
        if section.max_solve_rate is not None:
            prompts[PLAIN] = drop_easy_prompts(context, worker, prompts[PLAIN], seed, state)
        heldout.measure_if_due(state)
    samplers = [PromptSampler(part, seed) for part in prompts.values()]
    sampler = MixedSampler(samplers, [section.asked()[name].share for name in prompts], state.cursor)
    ranks = parallel.data_parallel_size()
    pairs: figures.ProbabilityPairs = ([], [])

    for step in range(state.step, section.train_steps):
        saver.stop_if_asked(state.to_json())
        started = time.perf_counter()
        with state.kept_when_stopped(saver):
            batch = dynamic_sampling(
                sampler, lambda part: worker.roll_out(part, schedule.window, section.group_size), section, ranks
            )
        rolled_out = time.perf_counter()
        plan = plan_updates(
            batch.groups, section, seed=f"{seed}/{step}", rank=parallel.data_parallel_rank(), ranks=ranks
        )
        agreement = add_old_logprobs(trainer, plan)
        rate = section.learning_rate.at(step, section.train_steps)
        trained = update(trainer, plan, section, rate)
        engine.update_weights(step + 1)

        metrics = rollout_metrics(batch) | family_metrics(batch, asked.pools) | agreement.metrics | trained
        metrics |= {"rl/window": schedule.window, "rl/learning_rate": rate}
        metrics |= _speed(metrics, rolled_out - started, time.perf_counter() - rolled_out)
        _take_notes(state, batch, trained, schedule.update(metrics["rl/perplexity"], metrics["rl/response_length_p99"]))
        context.log_metrics(step + 1, metrics)
        context.progress(step + 1, section.train_steps, f"correct {metrics['rl/correct']:.2f}")
        pairs = agreement.pairs if trained else pairs
        state.advance(sampler.cursor, schedule)
        if context.rank == 0 and _is_shown(section, state.step):
            write_rollouts(context.output / "rollouts" / f"step_{state.step:05d}.jsonl", batch)
        with state.kept_when_stopped(saver):
            heldout.measure_if_due(state)
        if state.step < section.train_steps and state.step % section.checkpoint_every == 0:
            saver.save(state.to_json())

    saved = saver.finish(state.to_json())
    engine.close()
    (_, before), (_, after) = state.heldout[0], state.heldout[-1]
    return context.finish(
        checkpoint=saved,
        key_metric="held-out pass@1",
        before=before["mean"],
        after=after["mean"],
        metrics=report.final_metrics(context, after),
        figures=figures.draw(context, before, after, pairs),
        notes=state.notes,
        left_out=asked.left_out,
    )


def _take_notes(state: State, batch: SampledBatch, trained: dict[str, float], moved: str | None) -> None:
    """What was unusual about a step, for the report."""
    step = state.step + 1
    if unjudged := [reason for group in batch.generated for reason in group.unjudged]:
        state.note(f"step {step}: {len(unjudged)} answers could not be judged and were left out: {unjudged[0]}")
    if not trained:
        state.note(f"step {step}: no group had variance in its rewards, nothing was trained")
    if moved:
        state.note(f"step {step}: {moved}")


def _is_shown(section: Rl, step: int) -> bool:
    """Whether the rollouts of a step are written down for reading."""
    return step in (1, section.train_steps) or step % section.evaluate_every == 0


def _speed(metrics: dict[str, float], rollout_seconds: float, update_seconds: float) -> dict[str, float]:
    """Tokens per second of all ranks together; updates count the forward for old log-probabilities."""
    return {
        "time/rollout_seconds": rollout_seconds,
        "time/update_seconds": update_seconds,
        "time/rollout_tokens_per_second": metrics["rl/generated_tokens"] / rollout_seconds,
        "time/update_tokens_per_second": metrics.get("rl/trained_tokens", 0.0) / update_seconds,
    }
