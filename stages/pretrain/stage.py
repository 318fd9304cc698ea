"""The stage `pretrain`."""

from __future__ import annotations

from pathlib import Path

from m1 import paths
from m1.config.pretrain import Pretrain
from m1.config.profile import Profile
from m1.formats import folder
from m1.planning.arithmetic import training_flops
from m1.planning.work import layout_rules
from m1.run.stage import Cost, Kind, Origin, Stage, Steps


def _steps(profile: Profile) -> tuple[Steps, ...]:
    part = profile.section("pretrain", Pretrain)
    return (Steps("pretrain", "pretrain", part.sequence_length, part.global_batch_size, part.micro_batch_size),)


def _cost(profile: Profile) -> Cost:
    part = profile.section("pretrain", Pretrain)
    tokens = part.train_steps * part.global_batch_size * part.sequence_length
    return Cost(tokens, training_flops(profile.model, tokens, part.sequence_length), steps=part.train_steps)


def _origin(profile: Profile, tokenizer: Path | None) -> Origin | None:
    """The base model that `init_from` names; refused where it is not the profile's model."""
    named = profile.section("pretrain", Pretrain).init_from
    if named is None:
        return None
    place = paths.ROOT / Path(named).expanduser()  # an absolute path stays as it is
    return Origin(str(place), folder.inspect(place, profile.model, tokenizer).digest)


STAGES = (
    Stage(
        name="pretrain",
        about="The model learns to predict the next token of the corpus.",
        kind=Kind.TRAINING,
        section=Pretrain,
        run="stages.pretrain.train:run",
        reads=("tokenizer", "tokens"),
        settings=("seed", "model", "parallel"),
        distributed=True,
        rules=lambda profile: layout_rules(profile, _steps(profile)),
        cost=_cost,
        steps=_steps,
        origin=_origin,
    ),
)
