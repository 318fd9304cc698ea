"""The loop of the supervised stages: steps, logging, held-out loss, checkpoints, and going on after an interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from m1.config.training import LearningRate
from m1.run.contract import StageContext
from m1.training import parallel
from m1.training.batch import Batch
from m1.training.saving import Saver
from m1.training.trainer import NonFiniteGradient, Trainer, language_model_loss


def train(
    context: StageContext,
    trainer: Trainer,
    *,
    steps: int,
    learning_rate: LearningRate,
    batches: Callable[[int], list[Batch]],
    held_out: Callable[[], dict[str, float]],
    evaluate_every: int,
    checkpoint_every: int,
    log_every: int,
    begin: Callable[[], None] = lambda: None,
) -> tuple[Path, dict[str, float], dict[str, float]]:
    """Train for `steps` optimizer steps, from the stage's own newest checkpoint where there is one.

    Learning rate and batches are functions of the step, so the step is all a checkpoint keeps of both.

    Args:
        batches: step -> this rank's micro-batches of that step.
        held_out: measures the model; its values are logged as "heldout/<name>".
        begin: called before the first step, and not where the stage goes on from a checkpoint of its own.

    Returns:
        The final checkpoint and the held-out values before the first and after the last step.

    Raises:
        Checkpointed: SIGTERM came; the state is saved.
    """
    saver = Saver(context, trainer)
    state = saver.resume()
    if state is not None:
        first, before = state["step"], state["before"]
    else:
        begin()
        first, before = 0, held_out()
        _log_held_out(context, 0, before)
    started, tokens = time.time(), 0.0
    for step in range(first, steps):
        saver.stop_if_asked({"step": step, "before": before})
        rate = learning_rate.at(step, steps)
        try:
            metrics = trainer.step(batches(step), language_model_loss, rate)
        except NonFiniteGradient:
            saver.settle()
            raise
        tokens += metrics.pop("tokens")
        done = step + 1
        if done % log_every == 0 or done == steps:
            speed = tokens / (time.time() - started)
            named = {f"train/{name}": value for name, value in metrics.items()}
            context.log_metrics(done, {**named, "train/learning_rate": rate, "train/tokens_per_second": speed})
            context.progress(done, steps, f"loss {metrics['loss']:.3f}")
        if done % evaluate_every == 0 and done < steps:
            _log_held_out(context, done, held_out())
        if done % checkpoint_every == 0 and done < steps:
            saver.save({"step": done, "before": before})
    final = {"step": steps, "before": before}
    saver.stop_if_asked(final)
    after = held_out()
    _log_held_out(context, steps, after)
    return saver.finish(final), before, after


def _log_held_out(context: StageContext, step: int, values: dict[str, float]) -> None:
    context.log_metrics(step, {f"heldout/{name}": value for name, value in values.items()})


def held_out_loss(trainer: Trainer, batches: list[Batch]) -> dict[str, float]:
    """Mean loss per token over all ranks' batches, and its perplexity."""
    loss = trainer.evaluate(batches)["loss"]
    return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}


def start(context: StageContext) -> None:
    """Join the process group; every stage that trains begins with this."""
    parallel.initialize(context.profile.parallel, context.profile.seed)
