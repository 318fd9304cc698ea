"""What would stop a run, found before it starts: one set of rules for the plan, the flow and a stage alone.

What is impossible by the profile alone is refused when the profile is read (`Stage.rules`). Here is what remains: what
this version cannot do yet, what this machine lacks, and memory that a layout would need and no rank has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from m1.config.profile import Profile
from m1.errors import ServiceError, UsageError
from m1.planning import memory
from m1.planning.work import load
from m1.run.registry import stage
from m1.run.resolve import Missing
from m1.run.stage import Need


def refusals(profile: Profile, stages: Iterable[str], gpu_memory: float | None = None) -> list[str]:
    """Why stages cannot run, one clause each, whatever this machine has.

    Args:
        gpu_memory: bytes of one rank's device; None leaves the question of memory out.
    """
    found = [clause for name in stages for clause in stage(name).limits(profile)]
    if gpu_memory is not None:
        found += _too_large(profile, stages, gpu_memory)
    return found


def _too_large(profile: Profile, stages: Iterable[str], gpu_memory: float) -> Iterator[str]:
    limit = gpu_memory * (1 - memory.RESERVE)
    for steps in (steps for name in stages for steps in stage(name).steps(profile)):
        _, needed = memory.largest(profile.model, profile.parallel, load(steps, profile.parallel))
        if needed.total > limit:
            yield (
                f"{steps.name}: the fullest rank would need {needed.total / 1e9:.3g} GB of {gpu_memory / 1e9:.3g} GB "
                f"(a reserve of {memory.RESERVE:.0%} kept); `m1 plan --layouts` finds layouts that fit"
            )


def unmet(profile: Profile, stages: Iterable[str], missing: Missing) -> list[ServiceError]:
    """What is missing on this machine, and for which stages, if the profile does not allow leaving it out."""
    wanted: dict[tuple[str, Need], list[str]] = {}
    for name in stages:
        for family, demand in stage(name).demands(profile).items():
            if demand.required:
                wanted.setdefault((family, demand.need), []).append(name)
    found = []
    for (family, need), names in wanted.items():
        if (error := missing(need)) is not None:
            why = f"{', '.join(names)}: {error.what}, and the profile does not let a run go without tasks of {family}"
            found.append(ServiceError(why, error.hint))
    return found


def check(profile: Profile, stages: Iterable[str], missing: Missing, gpu_memory: float | None = None) -> None:
    """Refuse what would stop one of these stages.

    Raises:
        UsageError: this version cannot do it, or it does not fit.
        ServiceError: this machine lacks something that the profile does not let it go without.
    """
    names = list(stages)
    if broken := refusals(profile, names, gpu_memory):
        raise UsageError("; ".join(broken), f"Change profile {profile.name}, or leave these stages out.")
    for error in unmet(profile, names, missing):
        raise error
