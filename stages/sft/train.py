"""Supervised cold start."""

from __future__ import annotations

import math

from m1.stage import StageContext, StageResult
from m1.tokenizer import load_tokenizer
from m1.training import loop, parallel
from m1.training.batch import Batch
from m1.training.data import even_batches, read_samples, sample_batches, shuffled
from m1.training.figures import training_figures
from m1.training.trainer import Trainer


def run(context: StageContext) -> StageResult:
    settings, profile = context.profile.sft, context.profile
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

    def batches(step: int) -> list[Batch]:
        chosen = [samples[shuffled(len(samples), profile.seed, i)] for i in range(step * size, (step + 1) * size)]
        return sample_batches(chosen, settings.micro_batch_size, rank, ranks)

    held_out = even_batches(unseen, settings.micro_batch_size, rank, ranks)
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
