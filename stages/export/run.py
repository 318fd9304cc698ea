"""Export a checkpoint in a layout that others read, and check it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from m1.config.export import Export
from m1.config.parallel import Parallel
from m1.errors import StageFailed
from m1.files import unfinished
from m1.formats import layouts
from m1.formats.mapping import Form
from m1.formats.megatron import CheckpointTensors
from m1.planning import arithmetic
from m1.run.contract import StageContext, StageResult
from m1.training import checkpoint, parallel
from stages.export import card, check, files


def run(context: StageContext[Export]) -> StageResult:
    """Write `model/` in the run folder; it appears there only once it agrees with the training model.

    The checkpoint is read and the files are written tensor by tensor, in one process. With `export.check: logits` that
    process then holds the whole model twice; both sides compute in float32, where they are the same function.

    Raises:
        UsageError: the layout cannot represent the model, or the tokenizer does not fit it.
        StageFailed: the exported model differs from the training model.
    """
    settings, section = context.profile, context.section
    source = CheckpointTensors(context.parent_checkpoint())
    layouts.require_representable(settings.model, section.layout, source.rotary_base)
    tokens = None
    if section.check == "logits":
        tokens = check.heldout_tokens(context.data["tokens"] / "heldout", section.check_tokens)
    context.progress(0, 4, "verifying the checkpoint")
    checkpoint.verify(context.parent_checkpoint())

    final = context.output / "model"
    try:
        with unfinished(final, sole_writer=True) as folder:
            context.progress(1, 4, "writing the weights")
            size = files.write(folder, source, source.rotary_base, settings, context.data["tokenizer"])
            context.progress(2, 4, "reading the weights back")
            count = check.weights(folder, source, settings.model, Form.of(settings))
            found = None
            if tokens is not None:
                context.progress(3, 4, "comparing with the training model")
                found = _compare(context, folder, tokens)
            (folder / "README.md").write_text(
                card.render(context, found, count, source.rotary_base, size), encoding="utf-8"
            )
    except OSError as error:
        raise StageFailed(f"export: {final} could not be written: {error}", "Free disk space and rerun.") from error
    return _finish(context, final, found, count, size, source.rotary_base)


def _compare(context: StageContext[Export], folder: Path, tokens: Tensor) -> check.Comparison:
    """Raise StageFailed unless the folder and the training model give the same log-probabilities."""
    settings = context.profile
    alone = Parallel(world_size=1, threads_per_rank=settings.parallel.threads_per_rank, precision="fp32")
    parallel.initialize(alone, settings.seed)
    trained = checkpoint.load_model(context.parent_checkpoint(), settings.model, alone)
    found = check.compare(folder, context.section.layout, trained, tokens)
    check.require(found, context.section.tolerance)
    return found


def _finish(
    context: StageContext[Export],
    final: Path,
    found: check.Comparison | None,
    count: int,
    size: int,
    rotary_base: float,
) -> StageResult:
    settings = context.profile
    counts = arithmetic.parameters(settings.model)
    values = asdict(found) if found else {}
    metrics = {f"export/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
    metrics |= {"export/bytes": size, "export/parameters": counts.total, "export/active_parameters": counts.active}
    metrics |= {"export/weights_read_back": count}
    context.log_metrics(0, metrics)
    context.progress(4, 4, f"differs by {found.worst:.1e}" if found else f"{count} parameters read back")
    return context.finish(
        checkpoint=final,
        key_metric="max |logprob difference|" if found else "parameters that differ",
        before=None,
        after=found.worst if found else 0.0,
        metrics=metrics,
        notes=[
            files.rotary_note(settings.model, context.section.layout, rotary_base),
            f"A greedy answer: {found.answer!r}"
            if found
            else "Log-probabilities were not compared: export.check is weights.",
        ],
    )
