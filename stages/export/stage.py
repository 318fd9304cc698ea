"""The stage `export`."""

from __future__ import annotations

from collections.abc import Iterator

from m1.config.export import Export
from m1.config.profile import Profile
from m1.formats import layouts
from m1.run.stage import Kind, Stage


def _rules(profile: Profile) -> Iterator[str]:
    part = profile.section("export", Export)
    if part.head_precision == "bf16" and profile.parallel.precision == "fp32":
        yield "export: head_precision=bf16 with parallel.precision=fp32 would store the LM head coarser than the rest"
    yield from (f"export.layout={part.layout}: {rule}" for rule in layouts.unrepresentable(profile.model, part.layout))


STAGES = (
    Stage(
        name="export",
        about="The last checkpoint in a layout that others read, loaded back and compared.",
        kind=Kind.RESULT,
        section=Export,
        run="stages.export.run:run",
        reads=("tokenizer", "tokens"),
        settings=("model", "parallel.precision"),
        needs_checkpoint=True,
        rules=_rules,
    ),
)
