"""Export a checkpoint for transformers and check it: `python -m stages.export --profile tiny`."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict

from m1 import arithmetic
from m1.errors import M1Error, StageFailed
from m1.model import convert
from m1.profile import Parallel
from m1.stage import StageContext, StageResult, main
from m1.training import parallel
from m1.training.checkpoint import load_model
from stages.export import card, check, files


def run(context: StageContext) -> StageResult:
    """Write `model/` in the run folder; it appears there only once it agrees with the training model.

    One process holds the whole model, twice during the check. Both sides compute in float32, where they are the same
    function; the files keep every weight in the precision it was trained in.

    Raises:
        UsageError: transformers cannot represent the model, or the tokenizer does not fit it.
        StageFailed: the exported model differs from the training model by more than `export.tolerance`.
    """
    settings = context.profile
    convert.check_representable(settings.model)
    alone = Parallel(world_size=1, threads_per_rank=settings.parallel.threads_per_rank, precision="fp32")
    parallel.initialize(alone, settings.seed)
    context.progress(0, 3, "loading the checkpoint")
    trained = load_model(context.parent_checkpoint(), settings.model, alone)
    tokens = check.heldout_tokens(context.data["tokens"] / "heldout", settings.export.check_tokens)

    final, unfinished = context.output / "model", context.output / ".model.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    context.progress(1, 3, "writing the weights")
    try:
        size = files.write(unfinished, trained, settings, context.data["tokenizer"])
        context.progress(2, 3, "comparing with the training model")
        found = check.compare(unfinished, trained, tokens)
        check.require(found, settings.export.tolerance)
        (unfinished / "README.md").write_text(card.render(context, found, trained.rotary_base, size))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
    except OSError as error:
        raise StageFailed(f"export: {final} could not be written: {error}", "Free disk space and rerun.") from error
    except M1Error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    counts = arithmetic.parameters(settings.model)
    metrics = {f"export/{name}": value for name, value in asdict(found).items() if isinstance(value, (int, float))}
    metrics |= {"export/bytes": size, "export/parameters": counts.total, "export/active_parameters": counts.active}
    context.log_metrics(0, metrics)
    context.progress(3, 3, f"differs by {found.worst:.1e}")
    return context.finish(
        checkpoint=final,
        key_metric="max |logprob difference|",
        before=None,
        after=found.worst,
        metrics=metrics,
        notes=[files.rotary_note(settings.model, trained.rotary_base), f"A greedy answer: {found.answer!r}"],
    )


if __name__ == "__main__":
    main(run)
