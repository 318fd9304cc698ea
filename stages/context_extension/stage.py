"""The stage `context-extension`."""

from __future__ import annotations

from collections.abc import Iterator

from m1.config.context_extension import ContextExtension
from m1.config.profile import Profile
from m1.planning.arithmetic import training_flops
from m1.planning.work import layout_rules
from m1.run.stage import Cost, Kind, Stage, Steps


def _section(profile: Profile) -> ContextExtension:
    return profile.section("context-extension", ContextExtension)


def _steps(profile: Profile) -> tuple[Steps, ...]:
    return tuple(
        Steps(
            f"context-extension {number}",
            "context-extension",
            part.sequence_length,
            part.global_batch_size,
            part.micro_batch_size,
        )
        for number, part in enumerate(_section(profile).stages, 1)
    )


def _rules(profile: Profile) -> Iterator[str]:
    section, replicas = _section(profile), profile.parallel.data_parallel_size
    yield from layout_rules(profile, _steps(profile))
    if section.replay_samples % replicas:
        yield (
            f"context-extension.replay_samples={section.replay_samples} is not a multiple of the data-parallel size "
            f"{replicas}"
        )
    longest = max(part.sequence_length for part in section.stages)
    if longest > profile.model.max_position_embeddings:
        yield (
            f"context-extension: sequence_length={longest} exceeds model.max_position_embeddings="
            f"{profile.model.max_position_embeddings}"
        )


def _cost(profile: Profile) -> Cost:
    parts = _section(profile).stages
    counts = [
        (part.train_steps * part.global_batch_size * part.sequence_length, part.sequence_length) for part in parts
    ]
    flops = float(sum(training_flops(profile.model, count, length) for count, length in counts))
    steps = sum(part.train_steps for part in parts)
    return Cost(sum(count for count, _ in counts), flops, steps=steps)


STAGES = (
    Stage(
        name="context-extension",
        about="It is trained on longer and longer sequences, each stage at least twice the one before.",
        kind=Kind.TRAINING,
        section=ContextExtension,
        run="stages.context_extension.train:run",
        reads=("tokenizer", "tokens", "sft-data"),
        settings=("seed", "model", "parallel"),
        needs_checkpoint=True,
        distributed=True,
        rules=_rules,
        cost=_cost,
        steps=_steps,
    ),
)
