"""Supervised cold start."""

from __future__ import annotations

import math
from collections.abc import Callable

from m1.config.sft import Sft
from m1.run.contract import StageContext, StageResult
from m1.tokenizer import Tokenizer, load_tokenizer
from m1.training import loop, parallel
from m1.training.batch import Batch
from m1.training.data import TokenStream, even_batches, read_samples, sample_batches, share, shuffled
from m1.training.figures import training_figures
from m1.training.retrieval import Retrieval
from m1.training.trainer import Trainer


def run(context: StageContext[Sft]) -> StageResult:
    settings, profile = context.section, context.profile
    loop.start(context)
    rank, ranks = parallel.data_parallel_rank(), parallel.data_parallel_size()
    trainer = Trainer(
        profile.model,
        profile.parallel,
        seed=profile.seed,
        optimizer=settings.optimizer,
        moe_aux_loss_coeff=settings.moe_aux_loss_coeff,
    )
    trainer.load(context.parent_checkpoint(), optimizer=False)
    tokenizer = load_tokenizer(context.data["tokenizer"])
    samples = read_samples(context.data["sft-data"] / "train.jsonl", tokenizer, settings.sequence_length)
    unseen = read_samples(context.data["sft-data"] / "heldout.jsonl", tokenizer, settings.sequence_length)
    size = settings.global_batch_size

    replay = _text_replay(context, tokenizer)

    def batches(step: int) -> list[Batch]:
        chosen = [samples[shuffled(len(samples), profile.seed, i)] for i in range(step * size, (step + 1) * size)]
        answers = sample_batches(chosen, settings.micro_batch_size, rank, ranks, packed=settings.packed)
        return answers + replay(step)

    held_out = even_batches(unseen, settings.micro_batch_size, rank, ranks, packed=settings.packed)
    steps = max(1, math.ceil(settings.epochs * len(samples) / size))
    final, before, after = loop.train(
        context,
        trainer,
        steps=steps,
        learning_rate=settings.learning_rate,
        batches=batches,
        held_out=lambda: loop.held_out_loss(trainer, held_out),
        evaluate_every=settings.evaluate_every,
        checkpoint_every=settings.checkpoint_every,
        log_every=settings.log_every,
    )
    result = context.finish(
        checkpoint=final,
        key_metric="held-out response loss",
        before=before["loss"],
        after=after["loss"],
        metrics={**{f"heldout/{k}": v for k, v in after.items()}, "train/samples": steps * size},
        figures=training_figures(context),
    )
    parallel.shutdown()
    return result


def _text_replay(context: StageContext[Sft], tokenizer: Tokenizer) -> Callable[[int], list[Batch]]:
    """step -> this rank's micro-batches of pretraining text, none on most steps."""
    settings, seed = context.section.text, context.profile.seed
    if settings is None:
        return lambda step: []
    rank, ranks = parallel.data_parallel_rank(), parallel.data_parallel_size()
    stream = TokenStream(context.data["tokens"] / "train", settings.sequence_length, seed + 1)
    retrieval = Retrieval(tokenizer)

    def batches(step: int) -> list[Batch]:
        if step % settings.every:
            return []
        first = step // settings.every * settings.sequences
        mine = share(list(range(first, first + settings.sequences)), rank, ranks)
        weights = {"answer_weight": settings.question_weight, "text_weight": settings.weight}
        return [retrieval.batch(stream, mine, settings.questions, [seed], **weights)]

    return batches
