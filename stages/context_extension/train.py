"""Staged context extension."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from m1.config.context_extension import ContextExtension, ExtensionStage
from m1.config.sft import Sft
from m1.errors import M1Error
from m1.run.contract import StageContext, StageResult
from m1.tokenizer import load_tokenizer
from m1.training import loop, parallel
from m1.training.batch import Batch
from m1.training.data import Sample, TokenStream, read_samples, sample_batches, share, shuffled
from m1.training.figures import training_figures
from m1.training.retrieval import Retrieval
from m1.training.saving import Saver
from m1.training.trainer import Trainer, language_model_loss
from stages.context_extension import figures, probe


def run(context: StageContext[ContextExtension]) -> StageResult:
    settings, profile = context.section, context.profile
    loop.start(context)
    trainer = Trainer(
        profile.model,
        profile.parallel,
        seed=profile.seed,
        optimizer=settings.optimizer,
        moe_aux_loss_coeff=settings.moe_aux_loss_coeff,
    )
    saver = Saver(context, trainer)
    state = saver.resume()
    if state is None:
        state = {"done": 0, "step": 0, "probes": []}
        trainer.load(context.parent_checkpoint(), optimizer=False)
    retrieval = Retrieval(load_tokenizer(context.data["tokenizer"]))
    replay = _replay(context)
    if not state["probes"]:
        state["probes"].append(probe.measure(context, trainer, retrieval, settings.stages[-1].sequence_length))
    for number in range(state["done"], len(settings.stages)):
        _extend(context, saver, number, state, _batches(context, settings, number, retrieval, replay))
        saver.stop_if_asked(state)
        length = settings.stages[number].sequence_length
        state["probes"].append(probe.measure(context, trainer, retrieval, length))
        context.log_metrics(state["step"], state["probes"][-1]["metrics"])
        state["done"] = number + 1
        if state["done"] < len(settings.stages):
            saver.save(state)
    result = _finish(context, saver.finish(state), state)
    parallel.shutdown()
    return result


def _extend(
    context: StageContext[ContextExtension],
    saver: Saver,
    number: int,
    state: dict,
    batches: Callable[[int], list[Batch]],
) -> None:
    """Train one stage at its length and RoPE base, from the step that `state` says; a gradient explosion stops it."""
    settings = context.section
    trainer, stage = saver.trainer, settings.stages[number]
    trainer.set_rotary_base(stage.rotary_base)
    total = sum(s.train_steps for s in settings.stages)
    before = sum(s.train_steps for s in settings.stages[:number])
    for step in range(state["step"] - before, stage.train_steps):
        saver.stop_if_asked(state)
        metrics = trainer.step(batches(step), language_model_loss, settings.learning_rate.at(state["step"], total))
        state["step"] += 1
        norm = metrics["grad_norm"]
        if norm > settings.max_gradient_norm:
            saver.settle()
            raise M1Error(
                f"context-extension: the gradient norm rose to {norm:.3g} at length {stage.sequence_length}, above "
                f"max_gradient_norm={settings.max_gradient_norm}",
                "Add a stage with a smaller step in length, or lower the learning rate; finished stages are kept.",
            )
        if state["step"] % settings.log_every == 0 or state["step"] == total:
            layers = trainer.layer_gradient_norms()
            context.log_metrics(
                state["step"],
                {
                    "train/loss": metrics["loss"],
                    "train/grad_norm": norm,
                    "train/tokens_seen": metrics["tokens_seen"],
                    "train/sequence_length": stage.sequence_length,
                    **{f"train/{name}": value for name, value in metrics.items() if name.startswith("moe_")},
                    **{f"layers/grad_norm_{layer:02d}": value for layer, value in layers.items()},
                },
            )
        context.progress(state["step"], total, f"length {stage.sequence_length}, loss {metrics['loss']:.3f}")
        if (
            settings.checkpoint_every
            and state["step"] % settings.checkpoint_every == 0
            and step + 1 < stage.train_steps
        ):
            saver.save(state)


def _batches(
    context: StageContext[ContextExtension],
    settings: ContextExtension,
    number: int,
    retrieval: Retrieval,
    replay: list[Sample],
) -> Callable[[int], list[Batch]]:
    """step -> this rank's micro-batches: long real text with facts to retrieve, and replayed answers."""
    stage: ExtensionStage = settings.stages[number]
    seed = context.profile.seed
    rank, ranks = parallel.data_parallel_rank(), parallel.data_parallel_size()
    stream = TokenStream(context.data["tokens"] / "train", stage.sequence_length, seed + number)

    def batches(step: int) -> list[Batch]:
        first = step * stage.global_batch_size
        indices = share(list(range(first, first + stage.global_batch_size)), rank, ranks)
        result: list[Batch] = []
        for start in range(0, len(indices), stage.micro_batch_size):
            mine = indices[start : start + stage.micro_batch_size]
            questions, weight = settings.questions_per_sequence, settings.answer_weight
            result.append(retrieval.batch(stream, mine, questions, [seed, number], answer_weight=weight))
        if replay:
            count = settings.replay_samples
            chosen = [replay[shuffled(len(replay), seed + number, i)] for i in range(step * count, (step + 1) * count)]
            packed = context.profile.section("sft", Sft).packed
            for batch in sample_batches(chosen, count // ranks, rank, ranks, packed=packed):
                batch.loss_mask *= settings.answer_weight
                result.append(batch)
        return result

    return batches


def _replay(context: StageContext[ContextExtension]) -> list[Sample]:
    """Worked answers to mix in, if the model has been through SFT already."""
    if context.section.replay_samples == 0:
        return []
    if "sft" not in [upstream.stage for upstream in context.request.history]:
        return []
    tokenizer = load_tokenizer(context.data["tokenizer"])
    return read_samples(
        context.data["sft-data"] / "train.jsonl", tokenizer, context.profile.section("sft", Sft).sequence_length
    )


def _finish(context: StageContext[ContextExtension], final: Path, state: dict) -> StageResult:
    """Figures and result: retrieval and held-out loss by position after every stage."""
    probes = state["probes"]
    drawn: list[Path] = []
    if context.rank == 0:
        drawn = [*training_figures(context), *figures.draw(context, probes)]
    before, after = probes[0]["retrieval"], probes[-1]["retrieval"]
    length = probes[-1]["length"]
    metrics = {k: v for measured in probes[1:] for k, v in measured["metrics"].items()}
    metrics[f"retrieval/{length}_before"] = before
    return context.finish(
        checkpoint=final,
        key_metric=f"retrieval at {length} tokens",
        before=before,
        after=after,
        metrics=metrics,
        figures=drawn,
    )
