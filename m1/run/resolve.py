"""From a stage and a profile to one execution: the data it reads, the run it starts from, its run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from m1 import paths
from m1.config.profile import Profile
from m1.data import content, lock
from m1.errors import M1Error, UsageError
from m1.run import folder
from m1.run.contract import StageRequest, StageResult, Upstream, load_result, newest_run
from m1.run.identity import fingerprint
from m1.run.registry import parent_of, stage
from m1.run.stage import Demand, Need

#: Why a need is not met at this moment; None if it is met. `infra.tools.missing` is one.
Missing = Callable[[Need], M1Error | None]


def resolve(stage_name: str, profile: Profile, missing: Missing, *, parent: Path | None = None) -> StageRequest:
    """Inputs of a stage: the recorded data and the parent run.

    Args:
        missing: says whether what the stage's task families need is there. A family whose need is missing is left out,
            unless a run with it is complete already.
        parent: run folder to start from; by default the newest finished run of the stage that precedes in the order.

    Raises:
        UsageError: data or a parent is missing, with the command that makes it.
    """
    record = stage(stage_name)
    assert not record.makes_data, "data stages are run by their command in dvc.yaml"
    digests = _data_digests(stage_name, profile)
    parent_stage = parent_of(profile, stage_name)
    if parent is None and parent_stage is not None:
        parent = _newest_parent(stage_name, profile, parent_stage)
    result = _parent_result(stage_name, parent)
    history: tuple[Upstream, ...] = ()
    if parent is not None and result is not None:
        history = (*result.request.history, Upstream(stage=result.stage, run=str(parent)))
    origin = record.origin(profile, paths.data_dir(profile.name, "tokenizer"))

    def identified(left_out: tuple[str, ...]) -> tuple[str, Path]:
        identity = fingerprint(
            stage_name,
            profile,
            digests,
            parent=result.fingerprint if result else None,
            history=[upstream.folder.name for upstream in history],
            origin=origin,
            left_out=left_out,
        )
        return identity, paths.runs_dir(profile.name, stage_name) / identity[:16]

    left_out: tuple[str, ...] = ()
    identity, output = identified(left_out)
    if record.demands(profile) and load_result(output) is None:  # a run that is complete needs nothing any more
        left_out = families_left_out(record.demands(profile), missing)
        identity, output = identified(left_out)
    return StageRequest(
        stage=stage_name,
        profile=profile.to_dict(),
        fingerprint=identity,
        output=str(output),
        data={name: str(paths.data_dir(profile.name, name)) for name in digests},
        data_digests=digests,
        parent=str(parent) if parent else None,
        parent_stage=result.stage if result else None,
        history=history,
        origin=origin,
        left_out=left_out,
    )


def families_left_out(demands: Mapping[str, Demand], missing: Missing) -> tuple[str, ...]:
    """Families whose need is not met at this moment."""
    found = {demand.need: missing(demand.need) for demand in demands.values()}
    return tuple(family for family, demand in demands.items() if found[demand.need] is not None)


def _data_digests(stage_name: str, profile: Profile) -> dict[str, str]:
    digests: dict[str, str] = {}
    for name in stage(stage_name).reads_of(profile):
        digest = lock.digest(name, profile.name)
        if digest is None or not paths.data_dir(profile.name, name).exists():
            raise UsageError(
                f"{stage_name}: the data set {name} of profile {profile.name} is not there",
                f"Make it with `prefect deployment run m1/{name}` or `dvc repro {name}@{profile.name}`.",
            )
        content.verify(name, profile.name)
        digests[name] = digest
    return digests


def _newest_parent(stage_name: str, profile: Profile, parent_stage: str) -> Path:
    found = newest_run(profile.name, parent_stage)
    if found is None:
        raise UsageError(
            f"{stage_name}: no finished run of {parent_stage}, which it starts from",
            f"Run it first: `prefect deployment run m1/{parent_stage}`, or name one with upstream=<run>.",
        )
    return found


def _parent_result(stage_name: str, parent: Path | None) -> StageResult | None:
    if parent is None:
        return None
    result = load_result(parent)
    if result is None or result.checkpoint is None:
        raise UsageError(f"{stage_name}: upstream run {parent} is not complete", "Rerun it, or name another run.")
    return result


def resumed(request: StageRequest, run: Path) -> StageRequest:
    """`request`, continuing the checkpoints of `run`: the same work at another parallel layout.

    Raises:
        UsageError: `run` is no run folder of this stage, or it differs in more than its layout.
    """
    hint = "Name one below runs/."
    other = folder.require_record(run / folder.REQUEST, StageRequest, hint)
    if other is None:
        raise UsageError(f"--resume {run} is not a run folder", hint)
    names = [request.stage, *(name for name in stage(request.stage).settings if name != "parallel")]
    facts = [
        ("stage", request.stage, other.stage),
        ("data", request.data_digests, other.data_digests),
        ("upstream run", request.history, other.history),
        ("task families", request.left_out, other.left_out),
        *((name, request.profile.get(name), other.profile.get(name)) for name in names),
    ]
    different = [name for name, ours, theirs in facts if ours != theirs]
    if different:
        raise UsageError(
            f"--resume {run}: it differs from this run in {', '.join(different)}; only the parallel layout may differ",
            "Name another run, or leave --resume out.",
        )
    return request.model_copy(update={"resume": str(run.resolve())})
