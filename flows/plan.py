"""What a run would do, stage by stage, and why; nothing is started."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra import dvc
from m1 import paths
from m1 import profile as profiles
from m1.arithmetic import forward_flops, training_flops
from m1.errors import UsageError
from m1.planning.work import rl_cost
from m1.profile import DATA_STAGES, READS, STAGES, TRAINING_STAGES, Evaluate, Profile
from m1.stage import (
    REQUEST,
    STAGE_INFO,
    StageRequest,
    asks_for_swe,
    base_model,
    code_digest,
    code_of,
    data_digest,
    engine_answers,
    fingerprint,
    load_result,
    newest_run,
    read_metrics,
    resolve,
)
from m1.tracking import records

#: Beside the inputs of a stage that will leave its software-engineering part out.
NO_ENGINE = "no engine: without software-engineering tasks"


@dataclass
class Row:
    """One stage of the plan.

    Attributes:
        action: "run" or "skip".
        reason: why, naming what changed.
        inputs: data sets with the first digits of their hash, and the run it starts from.
        tokens: tokens the stage is expected to process, or None where that has no meaning.
        bound: whether `tokens` is an upper bound.
        output: folder with the result, where it is known beforehand.
    """

    stage: str
    action: str
    reason: str
    inputs: list[str] = field(default_factory=list)
    tokens: int | None = None
    bound: bool = False
    output: Path | None = None


def load_profile(name: str, *, seed: int | None = None, overrides: dict[str, Any] | None = None) -> Profile:
    """A profile of `profiles/` with a run's own seed and overrides.

    Raises:
        UsageError: no such profile, a field is wrong, or an override would not reach the stage that reads it.
    """
    overrides = dict(overrides or {})
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if path.resolve().parent != paths.PROFILES:
            raise UsageError(
                f"profile {name!r} is not in {paths.PROFILES}, where the data stages look for it",
                f"Move the file there and name it without .yaml; now there are: {', '.join(profiles.available())}.",
            )
        name = path.stem
    for key in overrides:
        # The command in dvc.yaml reads the profile from its file, so that DVC can tell what a data set was made from.
        if key.split(".")[0] in (*DATA_STAGES, "name") or key in ("model", "model.vocab_size"):
            raise UsageError(
                f"override {key}: the data stages read profiles/{name}.yaml itself",
                "Change the file, or make a new profile from it.",
            )
    if seed is not None:
        overrides["seed"] = seed
    settings = profiles.load(name, overrides=overrides)
    if settings.name != name:
        raise UsageError(
            f"profiles/{name}.yaml: name is {settings.name!r}", f"Set `name: {name}`, as its folders are named by it."
        )
    return settings


def select(settings: Profile, start: str | None, stop: str | None, only: list[str] | None) -> list[str]:
    """The stages to run, in the profile's order.

    Raises:
        UsageError: a name is unknown or not in the order, or `start` comes after `stop`.
    """
    for option, names in (("start", [start]), ("stop", [stop]), ("only", only or [])):
        for name in names:
            if name is None or name in settings.order:
                continue
            what = "is not a stage" if name not in STAGES else f"is not in the order of profile {settings.name}"
            raise UsageError(f"{option}={name!r} {what}", f"Choose from: {', '.join(settings.order)}.")
    if only:
        if start or stop:
            raise UsageError("only cannot be combined with start or stop", "Give one or the other.")
        return [stage for stage in settings.order if stage in only]
    first = settings.order.index(start) if start else 0
    last = settings.order.index(stop) if stop else len(settings.order) - 1
    if first > last:
        raise UsageError(f"start={start} comes after stop={stop}", f"The order is: {', '.join(settings.order)}.")
    return settings.order[first : last + 1]


def check_upstream(settings: Profile, stages: list[str]) -> None:
    """`upstream` names the parent of the first selected stage that has one.

    Raises:
        UsageError: no selected stage can start from it.
    """
    first = next((stage for stage in stages if stage not in DATA_STAGES), None)
    if first is None or settings.parent_of(first) is None:
        what = f"{first} starts from nothing" if first else "data stages start from no run"
        raise UsageError(f"upstream cannot be used here: {what}", "Select a later stage with start or only.")


def find_upstream(upstream: str, settings: Profile) -> Path | None:
    """Run folder named by its path or by the first digits of its fingerprint; None if it is neither.

    Raises:
        UsageError: the digits fit several runs, or the run is not complete.
    """
    named = Path(upstream)
    folder = named if named.is_absolute() else paths.ROOT / named
    if folder.is_dir():
        matches = [folder]
    elif len(upstream) >= 4 and set(upstream) <= set("0123456789abcdef"):
        root = paths.runs_dir(settings.name, "x").parent
        matches = [run for run in sorted(root.glob(f"*/{upstream[:16]}*")) if run.is_dir()]
    else:
        return None
    if len(matches) > 1:
        raise UsageError(
            f"upstream={upstream} fits {len(matches)} runs", f"Give more digits: {', '.join(map(_shown, matches))}."
        )
    if not matches:
        return None
    result = load_result(matches[0])
    if result is None or result.checkpoint is None:
        raise UsageError(
            f"upstream={upstream}: {_shown(matches[0])} holds no finished checkpoint", "Name a complete run."
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
) -> list[Row]:
    """One row per selected stage, in order.

    Raises:
        UsageError: the selection is wrong, or an input is missing that no selected stage makes.
    """
    stages = select(settings, start, stop, only)
    targets = {stage: f"{stage}@{settings.name}" for stage in stages if stage in DATA_STAGES}
    listed = dvc.lists_profile(settings.name)
    status = dvc.status(list(targets.values())) if listed else {}
    if upstream is not None:
        check_upstream(settings, stages)
    rows: list[Row] = []
    will_run: dict[str, Row] = {}
    parents: dict[str, Path] = {}
    for stage in stages:
        if stage in DATA_STAGES:
            reasons = [*status.get(targets[stage], []), *left_out(settings, stage)] if listed else ["never run"]
            row = _data_row(settings, stage, reasons, will_run, force)
        else:
            row = _run_row(settings, stage, will_run, parents, upstream, force)
            upstream = None  # the parent of the first of them; the others follow each other
            if row.output is not None and stage in TRAINING_STAGES:
                parents[stage] = row.output
        if row.action == "run":
            will_run[stage] = row
        rows.append(row)
    return rows


def _data_row(settings: Profile, stage: str, reasons: list[str], will_run: dict[str, Row], force: bool) -> Row:
    inputs = [f"profiles/{settings.name}.yaml", *(_data_input(settings, name) for name in READS[stage])]
    row = Row(stage, "run", "", inputs, output=paths.data_dir(settings.name, stage))
    rerun = [name for name in READS[stage] if name in will_run]
    if force:
        row.reason = "forced"
    elif data_digest(settings.name, stage) is None:
        row.reason = "never run"
    elif reasons:
        row.reason = "; ".join(reasons)
    elif rerun:
        row.reason = f"upstream: {' and '.join(rerun)} will run (skipped after all if that changes nothing)"
    else:
        row.action, row.reason = "skip", "unchanged: DVC finds the same inputs, command and output"
    if row.action == "run" and asks_for_swe(stage, settings) and not engine_answers(stage, settings):
        row.inputs.append(NO_ENGINE)
    return row


def left_out(settings: Profile, stage: str) -> list[str]:
    """What DVC cannot see: software-engineering tasks were left out for want of an engine, and now there is one.

    The other way round nothing is missing: a set that was made needs no engine to be used.

    Raises:
        ServiceError: there is none, and the profile does not want to go without.
    """
    if stage != "synthesize" or not asks_for_swe(stage, settings):
        return []
    missing = records.left_out(settings.name, stage)
    if missing and engine_answers(stage, settings):
        return [f"an engine answers now, and last time: {'; '.join(missing)}"]
    return []


def _run_row(
    settings: Profile,
    stage: str,
    will_run: dict[str, Row],
    parents: dict[str, Path],
    upstream: Path | None,
    force: bool,
) -> Row:
    tokens, bound = expected_tokens(settings, stage)
    parent_stage = settings.parent_of(stage)
    rerun = [name for name in READS[stage] if name in will_run]
    above = [parent_stage] if parent_stage in will_run and upstream is None else []
    row = Row(stage, "run", "", tokens=tokens, bound=bound)
    row.inputs = [_data_input(settings, name) for name in READS[stage]]
    if rerun or above:
        base_model(stage, settings)  # a base model that does not fit is named now, not after the data is made
        if above:
            row.inputs.append(f"{parent_stage} (new)")
        if asks_for_swe(stage, settings) and not engine_answers(stage, settings):
            row.inputs.append(NO_ENGINE)
        source = " and ".join([*rerun, *above])  # type: ignore[list-item]
        row.reason = f"upstream: {source} will run (skipped after all if that changes nothing)"
        return row
    parent = upstream if parent_stage is not None and upstream is not None else parents.get(parent_stage or "")
    request = resolve(stage, settings, parent=parent)
    row.output = Path(request.output)
    if request.parent is not None:
        row.inputs.append(_shown(Path(request.parent)))
    if request.engine is False:
        row.inputs.append(NO_ENGINE)
    if request.init_from is not None:
        row.inputs.append(f"base model {request.init_from['folder']} {request.init_from['digest'][:8]}")
    if force:
        row.reason = "forced"
    elif load_result(row.output) is not None:
        row.action, row.reason = "skip", f"unchanged: fingerprint {request.fingerprint[:16]} is complete"
    else:
        row.reason = why_run(request)
    return row


def _data_input(settings: Profile, stage: str) -> str:
    digest = data_digest(settings.name, stage)
    return f"{stage} {digest[:8]}" if digest else f"{stage} (not made yet)"


# --- why a stage runs -----------------------------------------------------------------------------------------------


def why_run(request: StageRequest) -> str:
    """What makes `request` differ from the newest finished run of its stage, or how far it came when interrupted."""
    output = Path(request.output)
    if (output / REQUEST).is_file():
        steps = [line["step"] for line in read_metrics(output)]
        return f"interrupted at step {max(steps)}" if steps else "interrupted before its first logged step"
    settings = request.load_profile()
    newest = newest_run(settings.name, request.stage)
    if newest is None:
        return "never run"
    result = load_result(newest)
    assert result is not None
    old = result.request
    reasons = []
    for section in STAGE_INFO[request.stage].sections:
        reasons += [
            f"profile: {text}"
            for text in dvc.differences(old["profile"].get(section), request.profile[section], section)
        ]
    if old["profile"]["seed"] != request.profile["seed"]:
        reasons.append(f"profile: seed {old['profile']['seed']} -> {request.profile['seed']}")
    changed = [name for name, value in request.data_digests.items() if old["data_digests"].get(name) != value]
    reasons += [f"data: {name} has other content" for name in changed]
    if (old.get("init_from") or {}).get("digest") != (request.init_from or {}).get("digest"):
        reasons.append(f"base model: {(request.init_from or {}).get('folder', 'none')} instead of the one before")
    if old.get("engine") != request.engine and None not in (old.get("engine"), request.engine):
        reasons.append("sandbox: " + ("an engine answers now" if request.engine else "no engine answers any more"))
    if old["parent"] != request.parent:
        reasons.append(f"upstream: starts from {_run_name(request.parent)}, was {_run_name(old['parent'])}")
    elif old["history"] != request.history and request.stage == "evaluate":
        reasons.append("upstream: other checkpoints to evaluate")
    if _code_changed(request.stage, result.fingerprint, old) or not reasons:
        reasons.append(f"code: changed, one of {', '.join(code_of(request.stage, settings))}")
    return "; ".join(reasons)


def _code_changed(stage: str, recorded: str, old: dict[str, Any]) -> bool:
    """Whether today's code with the old inputs would have another fingerprint than the one recorded."""
    parent = load_result(Path(old["parent"])) if old["parent"] else None
    if old["parent"] and parent is None:
        return False  # the old parent is gone: the code cannot be told apart from it
    history = [Path(folder).name for _, folder in old["history"]]
    try:
        settings = profiles.parse(old["profile"], "the earlier run")
    except UsageError:
        return True  # the profile's own form has changed since, which is code
    digests = old["data_digests"]
    base = (old.get("init_from") or {}).get("digest")
    above = parent.fingerprint if parent else None
    return fingerprint(stage, settings, digests, above, history, base, old.get("engine")) != recorded


# --- how much work it is --------------------------------------------------------------------------------------------


def expected_tokens(settings: Profile, stage: str) -> tuple[int | None, bool]:
    """Tokens the stage processes by the profile, and whether that number is an upper bound."""
    part: Any = settings.section(stage)
    if stage == "pretrain":
        return part.train_steps * part.global_batch_size * part.sequence_length, False
    if stage == "sft":
        samples = settings.sft_data.samples_per_task * len(settings.sft_data.tasks)
        return int(part.epochs * samples) * part.sequence_length, True  # samples are shorter than the sequence
    if stage == "context-extension":
        return sum(s.train_steps * s.global_batch_size * s.sequence_length for s in part.stages), False
    if stage in ("rl-40k", "rl-80k"):
        return int(rl_cost(settings, stage).tokens), True
    if stage == "evaluate":
        checkpoints = len([name for name in settings.order[: settings.order.index(stage)] if name in TRAINING_STAGES])
        prompts = part.prompts_per_task * len(settings.synthesize.tasks)
        length = settings.rl_40k.max_prompt_length + part.max_new_tokens
        return checkpoints * (prompts * part.samples_per_prompt * length + _swe_tokens(part)), True
    return None, False


def _swe_tokens(part: Evaluate) -> int:
    """Of the software-engineering tasks that are put to one checkpoint."""
    swe = part.swe
    if swe is None:
        return 0
    length = swe.max_prompt_length + (swe.max_new_tokens or part.max_new_tokens)
    return 3 * swe.tasks_per_kind * swe.samples_per_task * length


def expected_flops(settings: Profile, stage: str) -> float | None:
    """Floating-point operations for `expected_tokens`.

    Training counts forward and backward. Reinforcement learning adds two forward passes, for its rollouts and for the
    old log-probabilities; evaluation is forward passes only.
    """
    tokens, _ = expected_tokens(settings, stage)
    part: Any = settings.section(stage)
    if tokens is None:
        return None
    if stage == "context-extension":
        steps = [(s.train_steps * s.global_batch_size * s.sequence_length, s.sequence_length) for s in part.stages]
        return float(sum(training_flops(settings.model, count, length) for count, length in steps))
    if stage in ("rl-40k", "rl-80k"):
        return rl_cost(settings, stage).flops
    if stage == "evaluate":
        return forward_flops(settings.model, tokens, settings.rl_40k.max_prompt_length + part.max_new_tokens)
    return float(training_flops(settings.model, tokens, part.sequence_length))


def expected(settings: Profile) -> dict[str, dict[str, float | None]]:
    """stage -> {"tokens", "flops"} of every stage that processes tokens, for the report's table of plan and actual."""
    found: dict[str, dict[str, float | None]] = {}
    for stage in settings.order:
        tokens, bound = expected_tokens(settings, stage)
        if tokens is not None:
            found[stage] = {"tokens": tokens, "flops": expected_flops(settings, stage), "bound": bound}
    return found


def _run_name(run: str | None) -> str:
    return _shown(Path(run)) if run else "nothing"


def _shown(path: Path) -> str:
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)


__all__ = [
    "Row",
    "code_digest",
    "expected",
    "expected_flops",
    "expected_tokens",
    "find_upstream",
    "load_profile",
    "plan",
    "select",
]
