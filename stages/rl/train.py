"""The reinforcement-learning loop (MiniMax-M1 report §3 to §5)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from m1.model.decoder import Decoder
from m1.stage import StageContext, StageResult
from m1.tokenizer import Tokenizer, load_tokenizer
from m1.training import loop, parallel
from m1.training.saving import Saver
from m1.training.stopping import StopRequested
from m1.training.trainer import Trainer
from stages.evaluate.pass_rate import accuracy_by_task, evaluate_prompts
from stages.evaluate.prompts import first_of_each_task, open_swe, read_prompts
from stages.rl import report
from stages.rl.checks import check
from stages.rl.rollouts import RolloutWorker, rollout_metrics, swe_metrics, write_rollouts
from stages.rl.sampling import MixedSampler, PromptSampler, dynamic_sampling
from stages.rl.solve_rate import drop_easy_prompts
from stages.rl.updates import add_old_logprobs, plan_updates, update
from stages.rl.windows import WindowSchedule

if TYPE_CHECKING:
    from stages.evaluate.swe import Swe

#: Periodic held-out check: samples per prompt and the report's decoding (§6).
HELDOUT = {"samples": 4, "temperature": 1.0, "top_p": 0.95}


def run(context: StageContext) -> StageResult:
    """Train the parent with the profile's objective; `rl-40k` and `rl-80k` differ in their section alone.

    A checkpoint keeps the step, the prompts' cursor, the windows' schedule and what was measured; learning rate and
    random numbers of the rollouts are functions of them. SIGTERM abandons rollouts; the state is that before the step.
    """
    check(context.stage, context.profile)
    loop.start(context)
    tokenizer = load_tokenizer(context.data["tokenizer"])
    with open_swe(context, "train", tokenizer) as (swe, said):
        result = _train(context, tokenizer, swe, said)
    parallel.shutdown()
    return result


def _train(context: StageContext, tokenizer: Tokenizer, swe: Swe | None, said: list[str]) -> StageResult:
    """The stage itself; `said` goes into the report."""
    settings, section = context.profile, context.section
    trainer = Trainer(
        settings.model,
        settings.parallel,
        seed=settings.seed,
        optimizer=section.optimizer,
        moe_aux_loss_coeff=section.moe_aux_loss_coeff,
    )
    saver = Saver(context, trainer)
    state = saver.resume()
    if state is None:
        trainer.load(context.parent_checkpoint(), optimizer=False)
        state = {"step": 0, "cursor": 0, "schedule": None, "notes": list(said), "heldout": []}
    decoder = Decoder(trainer.model)
    sandbox = swe.judge if swe else None
    seed = f"{settings.seed}/{context.stage}"  # the second stage does not meet the prompts in the first's order again
    worker = RolloutWorker(decoder, tokenizer, section, seed, saver.stop, sandbox)
    prompts = read_prompts(context.data["synthesize"] / "train.jsonl", tokenizer, section.max_prompt_length)
    heldout = first_of_each_task(
        read_prompts(context.data["synthesize"] / "heldout.jsonl", tokenizer), section.evaluate_prompts_per_task
    )

    def measure_if_due() -> None:
        """Held-out pass@1 of the present weights, logged and kept in `state`."""
        step = state["step"]
        due = step % section.evaluate_every == 0 or step == section.train_steps
        if not due or step in [measured for measured, _ in state["heldout"]]:
            return
        answered = evaluate_prompts(
            decoder,
            tokenizer,
            heldout,
            max_new_tokens=section.windows[-1],
            seed=f"{settings.seed}/heldout",
            stop=saver.stop,
            **HELDOUT,
        )
        accuracy = {task: entry.value for task, entry in accuracy_by_task(answered).items()}
        state["heldout"].append([step, accuracy])
        context.log_metrics(step, {f"heldout/pass@1/{task}": value for task, value in accuracy.items()})

    try:
        if section.max_solve_rate is not None:
            easy = context.output / "solve_rate.json"
            prompts, sentence = drop_easy_prompts(worker, prompts, section, seed, easy)
            if sentence not in state["notes"]:
                state["notes"].append(sentence)
        measure_if_due()
    except StopRequested:
        saver.leave(state)
    sampler: PromptSampler | MixedSampler = PromptSampler(prompts, seed, state["cursor"])
    if swe is not None:
        pools = PromptSampler(prompts, seed), PromptSampler(swe.prompts, seed)
        sampler = MixedSampler(*pools, section.swe.share, state["cursor"])
    schedule = WindowSchedule(section.windows, section.advance)
    if state["schedule"]:
        schedule.restore(state["schedule"])

    pairs: tuple[list[float], list[float]] = ([], [])
    for step in range(state["step"], section.train_steps):
        saver.stop_if_asked(state)
        started = time.perf_counter()
        try:
            batch = dynamic_sampling(
                sampler,
                lambda chosen: worker.roll_out(chosen, schedule.window, section.group_size),
                section,
                parallel.data_parallel_size(),
            )
        except StopRequested:
            saver.leave(state)
        rolled_out = time.perf_counter()
        plan = plan_updates(
            batch.groups,
            section,
            seed=f"{seed}/{step}",
            rank=parallel.data_parallel_rank(),
            ranks=parallel.data_parallel_size(),
        )
        agreement = add_old_logprobs(trainer, plan)
        learning_rate = section.learning_rate.at(step, section.train_steps)
        trained = update(trainer, plan, section, learning_rate)
        metrics = {
            **rollout_metrics(batch),
            **(swe_metrics(batch) if swe else {}),
            **agreement.metrics,
            **trained,
            "rl/window": schedule.window,
            "rl/learning_rate": learning_rate,
        }
        metrics |= _speed(metrics, rolled_out - started, time.perf_counter() - rolled_out)
        if unjudged := [reason for group in batch.generated for reason in group.unjudged]:
            state["notes"].append(
                f"step {step + 1}: the sandbox failed on {len(unjudged)} answers, which were left out: {unjudged[0]}"
            )
        if not trained:
            state["notes"].append(f"step {step + 1}: no group had variance in its rewards, nothing was trained")
        moved = schedule.update(metrics["rl/perplexity"], metrics["rl/response_length_p99"])
        if moved:
            state["notes"].append(f"step {step + 1}: {moved}")
        context.log_metrics(step + 1, metrics)
        context.progress(step + 1, section.train_steps, f"correct {metrics['rl/correct']:.2f}")
        pairs = agreement.pairs if trained else pairs

        last = step + 1 == section.train_steps
        if context.rank == 0 and (step == 0 or last or (step + 1) % section.evaluate_every == 0):
            write_rollouts(context.output / "rollouts" / f"step_{step + 1:05d}.jsonl", batch)
        state |= {"step": step + 1, "cursor": sampler.cursor, "schedule": schedule.state()}
        try:
            measure_if_due()
        except StopRequested:
            saver.leave(state)
        if not last and (step + 1) % section.checkpoint_every == 0:
            saver.save(state)

    saved = saver.finish(state)
    (_, before), (_, after) = state["heldout"][0], state["heldout"][-1]
    return context.finish(
        checkpoint=saved,
        key_metric="heldout pass@1",
        before=before["mean"],
        after=after["mean"],
        metrics=report.final_metrics(context, after),
        figures=report.draw(context, before, after, pairs),
        notes=state["notes"],
        left_out=[] if swe else said,
    )


def _speed(metrics: dict[str, float], rollout_seconds: float, update_seconds: float) -> dict[str, float]:
    """Tokens per second of all ranks together; updates count the forward for old log-probabilities."""
    return {
        "time/rollout_seconds": rollout_seconds,
        "time/update_seconds": update_seconds,
        "time/rollout_tokens_per_second": metrics["rl/generated_tokens"] / rollout_seconds,
        "time/update_tokens_per_second": metrics.get("rl/trained_tokens", 0.0) / update_seconds,
    }
