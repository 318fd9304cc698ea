"""Continual pretraining."""

from __future__ import annotations

from pathlib import Path

from m1.config.pretrain import Pretrain
from m1.errors import UsageError
from m1.formats import folder
from m1.run.contract import StageContext, StageResult
from m1.training import loop, parallel
from m1.training.batch import Batch, full_batch
from m1.training.data import TokenStream, share
from m1.training.figures import training_figures
from m1.training.trainer import Trainer

#: Sequences of the held-out set that every evaluation reads.
HELD_OUT_SEQUENCES = 64


def run(context: StageContext[Pretrain]) -> StageResult:
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
    stream = TokenStream(context.data["tokens"] / "train", settings.sequence_length, profile.seed)

    def batches(step: int) -> list[Batch]:
        first = step * settings.global_batch_size
        micro = range(first, first + settings.global_batch_size, settings.micro_batch_size)
        mine = share(list(micro), rank, ranks)
        return [full_batch(stream.sequences(range(i, i + settings.micro_batch_size))) for i in mine]

    notes: list[str] = []
    held_out = held_out_batches(context, settings.sequence_length, settings.micro_batch_size, rank, ranks)
    final, before, after = loop.train(
        context,
        trainer,
        steps=settings.train_steps,
        learning_rate=settings.learning_rate,
        batches=batches,
        held_out=lambda: loop.held_out_loss(trainer, held_out),
        evaluate_every=settings.evaluate_every,
        checkpoint_every=settings.checkpoint_every,
        log_every=settings.log_every,
        begin=lambda: notes.extend(start_from_base(context, trainer)),
    )
    tokens = settings.train_steps * settings.global_batch_size * settings.sequence_length
    result = context.finish(
        checkpoint=final,
        key_metric="held-out loss",
        before=before["loss"],
        after=after["loss"],
        metrics={**{f"heldout/{k}": v for k, v in after.items()}, "train/tokens": tokens},
        figures=training_figures(context),
        notes=notes,
    )
    parallel.shutdown()
    return result


def start_from_base(context: StageContext[Pretrain], trainer: Trainer) -> list[str]:
    """Load the weights that `pretrain.init_from` names, if it does; returns notes for the report."""
    named = context.request.origin
    if named is None:
        return []
    found = folder.inspect(Path(named.folder), context.profile.model, context.data["tokenizer"])
    if found.digest != named.digest:
        raise UsageError(
            f"pretrain.init_from={named.folder} has changed since this run was planned",
            "Start the run again: it is planned from the folder as it is now.",
        )
    return trainer.load_base(found)


def held_out_batches(context: StageContext[Pretrain], length: int, micro: int, rank: int, ranks: int) -> list[Batch]:
    """This rank's part of the held-out sequences, the same ones at every call."""
    stream = TokenStream(context.data["tokens"] / "heldout", length, 0)
    per_rank = max(1, min(HELD_OUT_SEQUENCES, stream.num_sequences) // (micro * ranks))
    groups = [range(i * micro, (i + 1) * micro) for i in range(per_rank * ranks)]
    return [full_batch(stream.sequences(group)) for group in share(groups, rank, ranks)]
