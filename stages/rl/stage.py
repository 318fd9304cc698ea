"""The stages `rl-40k` and `rl-80k`: the same work with other settings."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from infra import tools
from m1.config.profile import Profile
from m1.config.rl import Rl
from m1.planning.work import rl_cost
from m1.run.stage import Cost, Demand, Kind, Stage, Steps
from m1.tasks import families
from stages.rl.checks import limits, rules


def _steps(name: str, profile: Profile) -> tuple[Steps, ...]:
    """As if every response filled the longest window and no two shared their prompt: a bound of memory and time."""
    part = profile.section(name, Rl)
    update = part.prompts_per_step * part.group_size // part.updates_per_step
    return (Steps(name, name, part.longest_prompt + max(part.windows), update, part.micro_batch_size),)


def _cost(name: str, profile: Profile) -> Cost:
    part = profile.section(name, Rl)
    return rl_cost(profile.model, part)


def _demands(name: str, profile: Profile) -> dict[str, Demand]:
    return dict(families.demands(profile, profile.section(name, Rl).asked()))


def _plugins(name: str, profile: Profile) -> tuple[str, ...]:
    names = profile.section(name, Rl).asked()
    return (*families.modules(profile, names, name), *tools.modules(_demands(name, profile)))


def _rules(name: str, profile: Profile) -> Iterator[str]:
    yield from rules(name, profile)
    yield from families.rules(profile, profile.section(name, Rl).asked(), name)


def _stage(name: str, about: str, after: tuple[str, ...] = ()) -> Stage:
    return Stage(
        name=name,
        about=about,
        kind=Kind.REINFORCEMENT,
        section=Rl,
        run="stages.rl.train:run",
        reads=("tokenizer", "synthesize"),
        settings=("seed", "model", "parallel"),
        needs_checkpoint=True,
        distributed=True,
        after=after,
        rules=functools.partial(_rules, name),
        limits=functools.partial(limits, name),
        cost=functools.partial(_cost, name),
        steps=functools.partial(_steps, name),
        plugins=functools.partial(_plugins, name),
        loads=("m1.tasks.logic", "m1.tasks.swe", "infra.sandbox"),
        demands=functools.partial(_demands, name),
    )


STAGES = (
    _stage("rl-40k", "CISPO reinforcement learning with the shorter output window."),
    _stage("rl-80k", "The same, with an output window that grows when the criteria hold.", after=("rl-40k",)),
)
