"""The stage `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator

from infra import tools
from m1.config.evaluate import Evaluate
from m1.config.families import PLAIN
from m1.config.profile import Profile
from m1.config.rl import Rl
from m1.config.synthesize import Synthesize
from m1.planning.arithmetic import forward_flops
from m1.run.registry import stage
from m1.run.stage import Cost, Demand, Kind, Stage
from m1.tasks import families


def _section(profile: Profile) -> Evaluate:
    return profile.section("evaluate", Evaluate)


def _longest_prompt(profile: Profile) -> int:
    """The limit of the RL stages for plain prompts, which are of the same kind; 0 where there is no such stage."""
    limits = [rl.max_prompt_length for name in profile.order if (rl := profile.find(name, Rl)) is not None]
    return max(limits, default=0)


def _cost(profile: Profile) -> Cost:
    part = _section(profile)
    checkpoints = len([name for name in profile.order[: profile.order.index("evaluate")] if stage(name).trains])
    tokens = 0
    for name, asked in part.asked().items():
        tasks = len(profile.section("synthesize", Synthesize).tasks) if name == PLAIN else 3
        prompt = asked.prompts.max_prompt_length or _longest_prompt(profile)
        tokens += tasks * asked.per_task * asked.samples * (prompt + asked.max_new_tokens)
    tokens *= checkpoints
    length = _longest_prompt(profile) + part.max_new_tokens
    return Cost(tokens, rollout_flops=forward_flops(profile.model, tokens, length), bound=True)


def _demands(profile: Profile) -> dict[str, Demand]:
    return dict(families.demands(profile, _section(profile).asked()))


def _plugins(profile: Profile) -> tuple[str, ...]:
    names = _section(profile).asked()
    return (*families.modules(profile, names, "evaluate"), *tools.modules(_demands(profile)))


def _rules(profile: Profile) -> Iterator[str]:
    longest, most = _section(profile).max_new_tokens, profile.model.max_position_embeddings
    if longest >= most:
        yield f"evaluate.max_new_tokens={longest} leaves no room for a prompt in {most} positions of the model"
    yield from families.rules(profile, _section(profile).asked(), "evaluate")


STAGES = (
    Stage(
        name="evaluate",
        about="Every checkpoint answers the held-out tasks.",
        kind=Kind.RESULT,
        section=Evaluate,
        run="stages.evaluate.run:run",
        reads=("tokenizer", "synthesize"),
        settings=("seed", "model", "parallel"),
        needs_checkpoint=True,
        distributed=True,
        compares_history=True,
        rules=_rules,
        cost=_cost,
        plugins=_plugins,
        loads=("m1.tasks.logic", "m1.tasks.swe", "infra.sandbox"),
        demands=_demands,
    ),
)
