"""What a run would do, stage by stage, and why; nothing is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra import tools
from m1 import paths
from m1.config.differences import differences
from m1.config.profile import Profile
from m1.data import dvc, lock
from m1.errors import UsageError
from m1.run import folder, identity, profiles
from m1.run.contract import StageRequest, StageResult, fault_of, finished, load_request, load_result, newest_run
from m1.run.identity import fingerprint
from m1.run.registry import data_stages, parent_of, stage, stages
from m1.run.resolve import Missing, families_left_out, resolve
from m1.run.stage import Cost, Stage
from m1.tracking import records

Action = Literal["run", "skip"]


@dataclass(frozen=True)
class Row:
    """One stage of the plan.

    Attributes:
        reason: why it runs or is skipped, naming what changed.
        inputs: data sets with the first digits of their hash, and the run it starts from.
        cost: what it is expected to process, or None where that has no meaning.
        output: folder with the result, where it is known beforehand.
    """

    stage: str
    action: Action
    reason: str
    inputs: tuple[str, ...] = ()
    cost: Cost | None = None
    output: Path | None = None


def load_profile(name: str, *, seed: int | None = None, overrides: Mapping[str, object] | None = None) -> Profile:
    """A profile of `profiles/` with a run's own seed and overrides.

    Raises:
        UsageError: no such profile, a field is wrong, or an override would not reach the stage that reads it.
    """
    changes = dict(overrides or {})
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if path.resolve().parent != paths.PROFILES:
            raise UsageError(
                f"profile {name!r} is not in {paths.PROFILES}, where the data stages look for it",
                f"Move the file there and name it without .yaml; now there are: {', '.join(profiles.available())}.",
            )
        name = path.stem
    for key in changes:
        # The command in dvc.yaml reads the profile from its file, so that DVC can tell what a data set was made from.
        if key.split(".")[0] in (*data_stages(), "name") or key in ("model", *_data_settings()):
            raise UsageError(
                f"override {key}: the data stages read profiles/{name}.yaml itself",
                "Change the file, or make a new profile from it.",
            )
    if seed is not None:
        changes["seed"] = seed
    settings = profiles.load(name, overrides=changes)
    if settings.name != name:
        raise UsageError(
            f"profiles/{name}.yaml: name is {settings.name!r}", f"Set `name: {name}`, as its folders are named by it."
        )
    return settings


def _data_settings() -> set[str]:
    """Fields outside of their sections that data stages read; the seed is given to them all by a run's own option."""
    return {name for record in stages().values() if record.makes_data for name in record.settings} - {"seed"}


def select(settings: Profile, start: str | None, stop: str | None, only: list[str] | None) -> list[str]:
    """The stages to run, in the profile's order.

    Raises:
        UsageError: a name is unknown or not in the order, or `start` comes after `stop`.
    """
    for option, names in (("start", [start]), ("stop", [stop]), ("only", only or [])):
        for name in names:
            if name is None or name in settings.order:
                continue
            what = "is not a stage" if name not in stages() else f"is not in the order of profile {settings.name}"
            raise UsageError(f"{option}={name!r} {what}", f"Choose from: {', '.join(settings.order)}.")
    if only:
        if start or stop:
            raise UsageError("only cannot be combined with start or stop", "Give one or the other.")
        return [name for name in settings.order if name in only]
    first = settings.order.index(start) if start else 0
    last = settings.order.index(stop) if stop else len(settings.order) - 1
    if first > last:
        raise UsageError(f"start={start} comes after stop={stop}", f"The order is: {', '.join(settings.order)}.")
    return settings.order[first : last + 1]


def check_upstream(settings: Profile, chosen: Sequence[str]) -> None:
    """`upstream` names the parent of the first selected stage that has one.

    Raises:
        UsageError: no selected stage can start from it.
    """
    first = next((name for name in chosen if not stage(name).makes_data), None)
    if first is None or parent_of(settings, first) is None:
        what = f"{first} starts from nothing" if first else "data stages start from no run"
        raise UsageError(f"upstream cannot be used here: {what}", "Select a later stage with start or only.")


def find_upstream(upstream: str, settings: Profile) -> Path | None:
    """Run folder named by its path or by the first digits of its fingerprint; None if it is neither.

    Raises:
        UsageError: the digits fit several runs, or the run is not complete.
    """
    named = Path(upstream)
    place = named if named.is_absolute() else paths.ROOT / named
    if place.is_dir():
        matches = [place]
    elif len(upstream) >= 4 and set(upstream) <= set("0123456789abcdef"):
        root = paths.runs_dir(settings.name, "x").parent
        matches = [run for run in sorted(root.glob(f"*/{upstream[:16]}*")) if run.is_dir()]
    else:
        return None
    if len(matches) > 1:
        raise UsageError(
            f"upstream={upstream} fits {len(matches)} runs",
            f"Give more digits: {', '.join(map(paths.shown, matches))}.",
        )
    if not matches:
        return None
    result = load_result(matches[0])
    if result is None or result.checkpoint is None:
        raise UsageError(
            f"upstream={upstream}: {paths.shown(matches[0])} holds no finished checkpoint", "Name a complete run."
        )
    return matches[0]


def plan(
    settings: Profile,
    *,
    start: str | None = None,
    stop: str | None = None,
    only: list[str] | None = None,
    upstream: Path | None = None,
    force: bool = False,
    missing: Missing = tools.missing,
) -> list[Row]:
    """One row per selected stage, in order.

    Args:
        missing: asked for what task families need; the plan says which of them a run would leave out.

    Raises:
        UsageError: the selection is wrong, or an input is missing that no selected stage makes.
    """
    chosen = select(settings, start, stop, only)
    if upstream is not None:
        check_upstream(settings, chosen)
    return _Planner(settings, upstream, force, missing, _changes_of_data(settings, chosen)).rows(chosen)


def _changes_of_data(settings: Profile, chosen: Sequence[str]) -> Mapping[str, list[dvc.Change]] | None:
    """DVC's account of the chosen data stages that it knows; None where dvc.yaml does not list the profile yet.

    A stage that has come since `m1 up` wrote dvc.yaml is not listed there either, and has never been run.
    """
    names = [name for name in chosen if stage(name).makes_data and lock.digest(name, settings.name) is not None]
    if not dvc.lists_profile(settings.name):
        return None
    found = dvc.status([f"{name}@{settings.name}" for name in names])
    return {name: found[f"{name}@{settings.name}"] for name in names}


class _Planner:
    """Plans the chosen stages in order: which earlier ones will run decides what is known of the later ones."""

    def __init__(
        self,
        settings: Profile,
        upstream: Path | None,
        force: bool,
        missing: Missing,
        changes: Mapping[str, list[dvc.Change]] | None,
    ) -> None:
        self.settings, self.upstream, self.force, self.missing, self.changes = (
            settings,
            upstream,
            force,
            missing,
            changes,
        )
        self.will_run: set[str] = set()
        self.parents: dict[str, Path] = {}

    def rows(self, chosen: Sequence[str]) -> list[Row]:
        return [self._noted(self._data_row(name) if stage(name).makes_data else self._run_row(name)) for name in chosen]

    def _noted(self, row: Row) -> Row:
        if row.action == "run":
            self.will_run.add(row.stage)
        if row.output is not None and stage(row.stage).trains:
            self.parents[row.stage] = row.output
        return row

    def _left_out(self, record: Stage) -> list[str]:
        """For the column of inputs: the families that the stage would leave out."""
        names = families_left_out(record.demands(self.settings), self.missing)
        return [f"{_why_without(record, self.settings, name)}: without tasks of {name}" for name in names]

    def _data_row(self, name: str) -> Row:
        settings, record = self.settings, stage(name)
        inputs = [f"profiles/{settings.name}.yaml", *(self._data_input(read) for read in record.reads_of(settings))]
        rerun = [read for read in record.reads_of(settings) if read in self.will_run]
        reasons = [] if self.changes is None else data_reasons(settings, name, self.changes.get(name, []), self.missing)
        action: Action = "run"
        if self.force:
            reason = "forced"
        elif self.changes is None or lock.digest(name, settings.name) is None:
            reason = "never run"
        elif reasons:
            reason = "; ".join(reasons)
        elif rerun:
            reason = f"upstream: {' and '.join(rerun)} will run (skipped after all if that changes nothing)"
        else:
            action, reason = "skip", UNCHANGED_DATA
        if action == "run":
            inputs += self._left_out(record)
        return Row(name, action, reason, tuple(inputs), record.cost(settings), paths.data_dir(settings.name, name))

    def _run_row(self, name: str) -> Row:
        settings, record = self.settings, stage(name)
        upstream, self.upstream = self.upstream, None  # the parent of the first of them; the others follow each other
        parent_stage = parent_of(settings, name)
        rerun = [read for read in record.reads_of(settings) if read in self.will_run]
        above = [parent_stage] if parent_stage in self.will_run and upstream is None else []
        inputs = [self._data_input(read) for read in record.reads]
        cost = record.cost(settings)
        if rerun or above:
            record.origin(settings, None)  # a base model that does not fit is named now, not after the data is made
            inputs += [f"{parent_stage} (new)"] if above else []
            inputs += self._left_out(record)
            source = " and ".join([*rerun, *(each for each in above if each)])
            reason = f"upstream: {source} will run (skipped after all if that changes nothing)"
            return Row(name, "run", reason, tuple(inputs), cost)
        parent = upstream if parent_stage is not None and upstream is not None else self.parents.get(parent_stage or "")
        request = resolve(name, settings, self.missing, parent=parent)
        inputs += [paths.shown(Path(request.parent))] if request.parent else []
        if request.left_out:
            inputs += self._left_out(record)
        if request.origin is not None:
            inputs.append(f"base model {request.origin.folder} {request.origin.digest[:8]}")
        if self.force:
            action, reason = "run", "forced"
        elif finished(request) is not None:
            action, reason = "skip", unchanged(request)
        else:
            action, reason = "run", why_run(request)
        return Row(name, action, reason, tuple(inputs), cost, request.run)  # type: ignore[arg-type]

    def _data_input(self, name: str) -> str:
        digest = lock.digest(name, self.settings.name)
        return f"{name} {digest[:8]}" if digest else f"{name} (not made yet)"


UNCHANGED_DATA = "unchanged: same inputs, command, settings and code"


def unchanged(request: StageRequest) -> str:
    """Why a stage is skipped."""
    return f"unchanged: fingerprint {request.fingerprint[:16]} is complete"


def _why_without(record: Stage, settings: Profile, family: str) -> str:
    need = record.demands(settings)[family].need
    return "no engine" if need.value == "sandbox" else f"no {need.value}"


# --- why a stage runs -----------------------------------------------------------------------------------------------


def data_reasons(
    settings: Profile, name: str, changes: Sequence[dvc.Change], missing: Missing = tools.missing
) -> list[str]:
    """Why a data stage is not up to date, in plain words; none for one that is.

    Where it is known what the data set was made by, code and settings are compared by what they mean, and DVC's account
    counts for data and command only: a changed comment makes nothing run again, a new version of a package does.
    """
    record = stage(name)
    own = profiles.load(settings.name)  # what its command reads: a run's own seed or overrides do not reach it
    digest = lock.digest(name, settings.name)
    made_by = identity.made_by(record, own, digest) if digest else None
    unread = {f"data/{settings.name}/{each}" for each in record.unread(own)}
    changes = [change for change in changes if change.name not in unread]
    if not paths.data_dir(settings.name, name).exists():
        reasons = ["its output is not here"]
    elif made_by is None:
        reasons = _in_short(changes)
    else:
        reasons = [change.text for change in changes if not _is_code_or_setting(change)]
        reasons += identity.changes(made_by, identity.data_identity(record, own))
    return [*reasons, *_makes_up_for(settings, name, missing)]


def _in_short(changes: Sequence[dvc.Change]) -> list[str]:
    """The changes in words, those of the code in one clause."""
    code = [change.name for change in changes if change.side == "input" and not change.name.startswith("data/")]
    others = [change.text for change in changes if change.name not in code]
    if not code:
        return others
    named = ", ".join(code[:3]) + (f" and {len(code) - 3} more" if len(code) > 3 else "")
    return [*others, f"code: {named} changed"]


def _is_code_or_setting(change: dvc.Change) -> bool:
    return change.side == "setting" or (change.side == "input" and not change.name.startswith("data/"))


def _makes_up_for(settings: Profile, name: str, missing: Missing) -> list[str]:
    """What DVC cannot see: tasks were left out because what they need was missing, and it is there now.

    The other way round there is nothing to do: a set that was made can be used without it.
    """
    demands = stage(name).demands(settings)
    left_out = records.left_out(settings.name, name) if demands else []
    if left_out and len(families_left_out(demands, missing)) < len(demands):
        return [f"an engine answers now, and last time: {'; '.join(left_out)}"]
    return []


def why_run(request: StageRequest) -> str:
    """What makes `request` differ from the newest finished run of its stage, or how far it came when interrupted."""
    if (done := load_result(request.run)) is not None and (fault := fault_of(done)) is not None:
        return f"damaged: {fault}"
    if load_request(request.run) is not None:
        steps = [line.step for line in folder.read_metrics(request.run)]
        return f"interrupted at step {max(steps)}" if steps else "interrupted before its first logged step"
    name = str(request.profile["name"])
    newest = newest_run(name, request.stage)
    if newest is None:
        return "never run"
    result = load_result(newest)
    assert result is not None
    old, record = result.request, stage(request.stage)
    reasons = []
    for section in (request.stage, *(part.partition(".")[0] for part in record.settings)):
        texts = differences(old.profile.get(section), request.profile.get(section), section)
        reasons += [f"profile: {text}" for text in texts]
    changed = [data for data, digest in request.data_digests.items() if old.data_digests.get(data) != digest]
    reasons += [f"data: {data} has other content" for data in changed]
    if _digest(old) != _digest(request):
        reasons.append(f"base model: {request.origin.folder if request.origin else 'none'} instead of the one before")
    reasons += _other_families(old, request)
    if old.parent != request.parent:
        reasons.append(f"upstream: starts from {_run_name(request.parent)}, was {_run_name(old.parent)}")
    elif old.history != request.history and record.compares_history:
        reasons.append("upstream: other checkpoints to evaluate")
    if _code_changed(result) or not reasons:
        reasons.append("code: changed, or a package it imports")
    return "; ".join(dict.fromkeys(reasons))


def _digest(request: StageRequest) -> str | None:
    return request.origin.digest if request.origin else None


def _other_families(old: StageRequest, new: StageRequest) -> list[str]:
    there = [f"{name}: what it needs is there now" for name in old.left_out if name not in new.left_out]
    return there + [f"{name}: what it needs is not there any more" for name in new.left_out if name not in old.left_out]


def _code_changed(result: StageResult) -> bool:
    """Whether today's code with the old inputs would have another fingerprint than the one recorded."""
    old = result.request
    parent = load_result(Path(old.parent)) if old.parent else None
    if old.parent and parent is None:
        return False  # the old parent is gone: the code cannot be told apart from it
    try:
        settings = profiles.parse(old.profile, "the earlier run")
    except UsageError:
        return True  # the profile's own form has changed since, which is code
    today = fingerprint(
        old.stage,
        settings,
        old.data_digests,
        parent=parent.fingerprint if parent else None,
        history=[upstream.folder.name for upstream in old.history],
        origin=old.origin,
        left_out=old.left_out,
    )
    return today != result.fingerprint


def expected(settings: Profile) -> dict[str, Cost]:
    """Expected work of every stage that processes tokens, for the report's table of plan and actual."""
    costs = {name: stage(name).cost(settings) for name in settings.order}
    return {name: cost for name, cost in costs.items() if cost is not None}


def _run_name(run: str | None) -> str:
    return paths.shown(Path(run)) if run else "nothing"
