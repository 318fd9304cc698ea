"""The stage `sft`."""

from __future__ import annotations

from collections.abc import Iterator

from m1.config import layout
from m1.config.profile import Profile
from m1.config.sft import Sft
from m1.config.sft_data import SftData
from m1.planning.arithmetic import training_flops
from m1.planning.work import layout_rules
from m1.run.stage import Cost, Kind, Stage, Steps


def _steps(profile: Profile) -> tuple[Steps, ...]:
    part = profile.section("sft", Sft)
    return (Steps("sft", "sft", part.sequence_length, part.global_batch_size, part.micro_batch_size),)


def _rules(profile: Profile) -> Iterator[str]:
    yield from layout_rules(profile, _steps(profile))
    text, replicas = profile.section("sft", Sft).text, profile.parallel.data_parallel_size
    if text is None:
        return
    yield from (f"sft.text: {rule}" for rule in layout.sequence_rules(profile.parallel, text.sequence_length))
    if text.sequences % replicas:
        yield f"sft.text.sequences={text.sequences} is not a multiple of the data-parallel size {replicas}"


def _cost(profile: Profile) -> Cost:
    part, data = profile.section("sft", Sft), profile.section("sft-data", SftData)
    samples = data.samples_per_task * len(data.tasks)
    tokens = int(part.epochs * samples) * part.sequence_length  # samples are shorter than the sequence
    return Cost(tokens, training_flops(profile.model, tokens, part.sequence_length), bound=True)


STAGES = (
    Stage(
        name="sft",
        about="Supervised fine-tuning: it learns to think inside tags and then answer.",
        kind=Kind.TRAINING,
        section=Sft,
        run="stages.sft.train:run",
        reads=("tokenizer", "tokens", "sft-data"),
        settings=("seed", "model", "parallel"),
        needs_checkpoint=True,
        distributed=True,
        rules=_rules,
        cost=_cost,
        steps=_steps,
    ),
)
