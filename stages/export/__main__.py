"""Export a checkpoint in a layout that others read, and check it: `python -m stages.export --profile tiny`."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from m1 import arithmetic, interchange
from m1.errors import M1Error, StageFailed
from m1.model.stored import Form
from m1.profile import Parallel
from m1.stage import StageContext, StageResult, main
from m1.training import checkpoint, parallel
from m1.training.tensors import CheckpointTensors
from stages.export import card, check, files


def run(context: StageContext) -> StageResult:
    """Write `model/` in the run folder; it appears there only once it agrees with the training model.

    The checkpoint is read and the files are written tensor by tensor, in one process. With `export.check: logits` that
    process then holds the whole model twice; both sides compute in float32, where they are the same function.

    Raises:
        UsageError: the layout cannot represent the model, or the tokenizer does not fit it.
        StageFailed: the exported model differs from the training model.
    """
    settings = context.profile
    source = CheckpointTensors(context.parent_checkpoint())
    interchange.require_representable(settings.model, settings.export.layout, source.rotary_base)
    tokens = None
    if settings.export.check == "logits":
        tokens = check.heldout_tokens(context.data["tokens"] / "heldout", settings.export.check_tokens)
    context.progress(0, 4, "verifying the checkpoint")
    checkpoint.verify(context.parent_checkpoint())

    final, unfinished = context.output / "model", context.output / ".model.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    context.progress(1, 4, "writing the weights")
    try:
        size = files.write(unfinished, source, source.rotary_base, settings, context.data["tokenizer"])
        context.progress(2, 4, "reading the weights back")
        count = check.weights(unfinished, source, settings.model, Form.of(settings))
        found = None
        if tokens is not None:
            context.progress(3, 4, "comparing with the training model")
            found = _compare(context, unfinished, tokens)
        (unfinished / "README.md").write_text(card.render(context, found, count, source.rotary_base, size))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
    except OSError as error:
        raise StageFailed(f"export: {final} could not be written: {error}", "Free disk space and rerun.") from error
    except M1Error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return _finish(context, final, found, count, size, source.rotary_base)


def _compare(context: StageContext, folder: Path, tokens: Tensor) -> check.Comparison:
    """Raise StageFailed unless the folder and the training model give the same log-probabilities."""
    settings = context.profile
    alone = Parallel(world_size=1, threads_per_rank=settings.parallel.threads_per_rank, precision="fp32")
    parallel.initialize(alone, settings.seed)
    trained = checkpoint.load_model(context.parent_checkpoint(), settings.model, alone)
    found = check.compare(folder, settings.export.layout, trained, tokens)
    check.require(found, settings.export.tolerance)
    return found


def _finish(
    context: StageContext, final: Path, found: check.Comparison | None, count: int, size: int, rotary_base: float
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
            files.rotary_note(settings.model, settings.export.layout, rotary_base),
            f"A greedy answer: {found.answer!r}"
            if found
            else "Log-probabilities were not compared: export.check is weights.",
        ],
    )


if __name__ == "__main__":
    main(run)
