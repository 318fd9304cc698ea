"""Which stages run, and the reason given for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import scratch
import yaml

from flows import plan as planning
from infra import tools
from infra.sandbox import engine
from m1.config.profile import Profile
from m1.data import content, dvc
from m1.errors import ServiceError, UsageError
from m1.files import write_json
from m1.planning import preflight
from m1.run import folder
from m1.run.contract import StageResult, load_result
from m1.run.registry import data_stages, parent_of, training_stages
from m1.run.resolve import Missing, resolve
from m1.tracking import records

PAPER_ORDER = ["corpus", "tokenizer", "tokens", "sft-data", "pretrain", "context-extension", "sft", "synthesize"]
PAPER_ORDER += ["rl-40k", "rl-80k", "evaluate", "export"]
NO_ENGINE = "no engine: without tasks of swe"
AFTER_DATA = ["pretrain", "sft", "context-extension", "rl-40k", "rl-80k", "evaluate", "export"]


def make_data(checkout: Path, **contents: str) -> None:
    """Data sets of one small file each, as dvc.lock records them."""
    stages = {}
    for stage in data_stages():
        place = checkout / "data" / "scratch" / stage
        place.mkdir(parents=True, exist_ok=True)
        (place / "content").write_text(contents.get(stage.replace("-", "_"), f"{stage}-1"))
        digest = content.digest_of(place)
        stages[f"{stage}@scratch"] = {"cmd": "x", "outs": [{"path": f"data/scratch/{stage}", "md5": digest}]}
    (checkout / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def execute(
    settings: Profile, clock: list[float], missing: Missing = scratch.nothing_missing, stop: str | None = None
) -> list[str]:
    """Do what the flow does with stages that take no time, those before `stop`; returns those that had to run."""
    ran, runs = [], {}
    for stage in settings.order[: settings.order.index(stop) if stop else None]:
        if stage in data_stages():
            continue
        request = resolve(stage, settings, missing, parent=runs.get(parent_of(settings, stage) or ""))
        trains = stage in training_stages(settings)
        if load_result(request.run) is None:
            folder.prepare(request.run, request)
            clock[0] += 1
            result = StageResult(
                stage=stage,
                fingerprint=request.fingerprint,
                request=request,
                checkpoint="checkpoint" if trains else None,
                key_metric="loss",
                before=1.0,
                after=0.5,
                metrics={},
                finished_at=clock[0],
            )
            if trains:
                (request.run / "checkpoint").mkdir()
            folder.write_record(request.run / folder.RESULT, result)
            ran.append(stage)
        if trains:
            runs[stage] = request.run
    return ran


def run_of(stage: str, settings: Profile) -> Path:
    """The run folder of a stage with these settings."""
    return resolve(stage, settings, scratch.nothing_missing).run


@pytest.mark.parametrize(
    ("field", "value", "first", "order"),
    [
        ("pretrain.train_steps", 7, "pretrain", None),
        ("sft.epochs", 2.5, "sft", None),
        ("sft.epochs", 2.5, "sft", PAPER_ORDER),
        ("context-extension.probes", 5, "context-extension", None),
        ("context-extension.probes", 5, "context-extension", PAPER_ORDER),
        ("rl-40k.cispo.is_weight_max", 4.0, "rl-40k", None),
        ("rl-80k.train_steps", 40, "rl-80k", None),
        ("evaluate.samples_per_prompt", 9, "evaluate", None),
        ("export.check_tokens", 9, "export", None),
    ],
)
def test_a_changed_section_reruns_its_stage_and_those_below_it_only(
    checkout: Path, clock: list[float], field: str, value: Any, first: str, order: list[str] | None
) -> None:
    make_data(checkout)
    base = {"order": order} if order else {}
    before = planning.load_profile("scratch", overrides=base)
    ordered = [stage for stage in before.order if stage in AFTER_DATA]
    assert execute(before, clock) == ordered
    assert execute(before, clock) == []
    after = planning.load_profile("scratch", overrides={**base, field: value})
    # evaluate and export write no checkpoint: nothing is below them.
    expected = [first] if first in ("evaluate", "export") else ordered[ordered.index(first) :]
    rows = planning.plan(after, only=AFTER_DATA)
    assert [row.stage for row in rows if row.action == "run"] == expected
    old, new = _value(before, field), value
    reason = next(row.reason for row in rows if row.stage == first)
    assert reason == f"profile: {field} {json.dumps(old)} -> {json.dumps(new)}"
    assert execute(after, clock) == expected


def _value(settings: Profile, field: str) -> Any:
    node: Any = settings.to_dict()
    for part in field.split("."):
        node = node[part]
    return node


def test_reasons_tell_code_data_seed_and_upstream_apart(checkout: Path, clock: list[float]) -> None:
    make_data(checkout)
    settings = planning.load_profile("scratch")
    rows = planning.plan(settings, only=["pretrain"])
    assert [(row.action, row.reason) for row in rows] == [("run", "never run")]
    execute(settings, clock)

    def reason(stage: str, settings: Profile = settings, **options: Any) -> str:
        return planning.plan(settings, only=[stage], **options)[0].reason

    assert reason("sft").startswith("unchanged: fingerprint ")
    assert reason("sft", force=True) == "forced"
    assert reason("pretrain", planning.load_profile("scratch", seed=7)) == "profile: seed 1234 -> 7"

    make_data(checkout, tokens="tokens-2")
    assert reason("pretrain") == "data: tokens has other content"
    make_data(checkout)

    source = checkout / "stages" / "sft" / "train.py"
    text = source.read_text()
    source.write_text("# a comment is not code\n" + text)
    assert reason("sft").startswith("unchanged")
    source.write_text(text.replace("STEPS = 6", "STEPS = 8"))
    assert reason("sft").startswith("code: changed, or a package it imports")
    # Code and a field at once: both are named.
    both = reason("sft", planning.load_profile("scratch", overrides={"sft.epochs": 3.0}))
    assert both.startswith("profile: sft.epochs 1.0 -> 3.0; code: changed")
    source.write_text(text)

    other = planning.load_profile("scratch", overrides={"pretrain.train_steps": 3})
    execute(other, clock)
    pretrained = run_of("pretrain", settings)
    again = reason("sft", planning.load_profile("scratch", overrides={"sft.epochs": 3.0}), upstream=pretrained)
    assert "profile: sft.epochs 1.0 -> 3.0; upstream: starts from runs/scratch/pretrain/" in again
    assert "code" not in again


def test_starting_an_engine_makes_up_for_what_was_left_out(
    checkout: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing: list[ServiceError | None] = [ServiceError("no Docker engine answers", "Start one.")]
    monkeypatch.setattr(engine, "missing", lambda: missing[0])
    asked = {"share": 0.5, "max_prompt_length": 600}
    wishes = {"synthesize__swe": {"faults_per_package": 2, "question_length": 500}, "rl_40k__swe": asked}
    scratch.write_profile(checkout, **wishes)
    dvc.ensure_profile("scratch")
    summary = checkout / "data" / "scratch" / "synthesize" / "summary.json"
    summary.parent.mkdir(parents=True)
    write_json(summary, {"left_out": ["swe: skipped: no engine"]})
    make_data(checkout)
    settings = planning.load_profile("scratch")

    def row(stage: str, settings: Profile = settings) -> planning.Row:
        return planning.plan(settings, only=[stage])[0]

    assert NO_ENGINE in row("synthesize").inputs and "engine answers" not in row("synthesize").reason
    assert execute(settings, clock, tools.missing) == AFTER_DATA and execute(settings, clock, tools.missing) == []
    assert NO_ENGINE in row("rl-40k").inputs and NO_ENGINE not in row("rl-80k").inputs

    missing[0] = None
    assert "an engine answers now, and last time: swe: skipped: no engine" in row("synthesize").reason
    assert row("rl-40k").reason == "swe: what it needs is there now" and NO_ENGINE not in row("rl-40k").inputs
    write_json(summary, {"swe": {"rows": {"train": 6}}})
    make_data(checkout)
    assert execute(settings, clock, tools.missing) == ["rl-40k", "rl-80k", "evaluate", "export"]
    assert records.left_out(settings.name, "synthesize") == []

    missing[0] = ServiceError("no Docker engine answers", "Start one.")
    assert execute(settings, clock, tools.missing) == [], "what was done with an engine needs none any more"
    other = planning.load_profile("scratch", overrides={"rl-40k.train_steps": 3})
    assert row("rl-40k", other).action == "run" and NO_ENGINE in row("rl-40k", other).inputs
    scratch.write_profile(checkout, **wishes, synthesize__swe__when_no_engine="fail")
    strict = planning.load_profile("scratch", overrides={"rl-40k.train_steps": 3})
    assert row("rl-40k", strict).action == "run", "a plan is printed all the same"
    to_run = [planned.stage for planned in planning.plan(strict, only=AFTER_DATA) if planned.action == "run"]
    with pytest.raises(
        ServiceError, match=r"rl-40k: no Docker engine answers, and .* go without tasks of swe\. Start one\."
    ):
        preflight.check(strict, to_run, tools.missing)
    preflight.check(strict, ["rl-80k"], tools.missing)


def test_an_interrupted_stage_says_how_far_it_came(checkout: Path) -> None:
    make_data(checkout)
    settings = planning.load_profile("scratch")
    request = resolve("pretrain", settings, scratch.nothing_missing)
    folder.prepare(request.run, request)
    assert planning.plan(settings, only=["pretrain"])[0].reason == "interrupted before its first logged step"
    lines = [{"step": step, "time": 0, "metrics": {"train/loss": 1.0}} for step in (10, 20)]
    (request.run / folder.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert planning.plan(settings, only=["pretrain"])[0].reason == "interrupted at step 20"


def test_data_stages_go_by_dvc(checkout: Path) -> None:
    settings = planning.load_profile("scratch")
    assert {row.reason for row in planning.plan(settings, stop="sft-data")} == {"never run"}
    assert dvc.ensure_profile("scratch")
    assert not dvc.ensure_profile("scratch")
    for stage in ("corpus", "tokenizer"):
        scratch.shell(dvc.command(f"{stage}@scratch"), checkout)
        dvc.commit(f"{stage}@scratch")
    rows = {row.stage: row for row in planning.plan(settings, stop="sft-data")}
    assert [rows[stage].action for stage in ("corpus", "tokenizer", "tokens")] == ["skip", "skip", "run"]
    assert rows["corpus"].reason == planning.UNCHANGED_DATA

    scratch.write_profile(checkout, corpus__max_megabytes=3.5)
    rows = {row.stage: row for row in planning.plan(planning.load_profile("scratch"), stop="tokenizer")}
    assert rows["corpus"].reason == "profile: corpus.max_megabytes 8.0 -> 3.5"
    assert rows["tokenizer"].reason.startswith("upstream: corpus will run")

    scratch.write_profile(checkout)
    (checkout / "data" / "scratch" / "corpus" / "content.json").write_text("touched by hand")
    reason = planning.plan(planning.load_profile("scratch"), only=["corpus"])[0].reason
    assert "data/scratch/corpus is modified" in reason


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"start": "sfft"}, "start='sfft' is not a stage"),
        ({"stop": "pretrain", "start": "sft"}, "start=sft comes after stop=pretrain"),
        ({"only": ["sft", "nothing"]}, "only='nothing' is not a stage"),
        ({"only": ["sft"], "start": "sft"}, "only cannot be combined"),
    ],
)
def test_a_wrong_selection_is_refused(checkout: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        planning.plan(planning.load_profile("scratch"), **arguments)


def test_a_stage_outside_the_order_is_refused(checkout: Path) -> None:
    short = [stage for stage in planning.load_profile("scratch").order if stage != "rl-80k"]
    settings = planning.load_profile("scratch", overrides={"order": short})
    with pytest.raises(UsageError, match="only='rl-80k' is not in the order of profile scratch"):
        planning.select(settings, None, None, ["rl-80k"])


def test_a_missing_input_is_named_with_the_command_that_makes_it(checkout: Path, clock: list[float]) -> None:
    settings = planning.load_profile("scratch")
    with pytest.raises(UsageError, match=r"data set tokenizer of profile scratch is not there.*m1/tokenizer"):
        planning.plan(settings, only=["sft"])
    make_data(checkout)
    with pytest.raises(UsageError, match=r"no finished run of pretrain.*m1/pretrain"):
        planning.plan(settings, only=["sft"])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("nowhere", {}, "no file .*nowhere.yaml. Choose one of: renamed, scratch, tiny"),
        ("/tmp/elsewhere.yaml", {}, "is not in .*profiles"),
        (
            "scratch",
            {"overrides": {"corpus.max_megabytes": 1.0}},
            "override corpus.max_megabytes: the data",
        ),
        ("scratch", {"overrides": {"model.vocab_size": 512}}, "override model.vocab_size"),
        ("scratch", {"overrides": {"name": "other"}}, "override name"),
        ("scratch", {"overrides": {"sft.epoch": 1.0}}, "did you mean epochs"),
        ("scratch", {"overrides": {"parallel.world_size": 3}}, "multiple"),
        ("scratch", {"seed": -1}, "seed"),
        ("renamed", {}, "name is 'scratch'"),
    ],
)
def test_bad_profiles_are_refused(checkout: Path, name: str, options: dict[str, Any], words: str) -> None:
    (checkout / "profiles" / "renamed.yaml").write_text((checkout / "profiles" / "scratch.yaml").read_text())
    with pytest.raises(UsageError, match=words):
        planning.load_profile(name, **options)


def test_upstream_by_folder_and_fingerprint(checkout: Path, clock: list[float]) -> None:
    make_data(checkout)
    settings = planning.load_profile("scratch")
    execute(settings, clock)
    run = run_of("pretrain", settings)
    assert planning.find_upstream(str(run), settings) == run
    assert planning.find_upstream(str(run.relative_to(checkout)), settings) == run
    assert planning.find_upstream(run.name[:10], settings) == run
    assert planning.find_upstream("m1-scratch@pretrain", settings) is None
    with pytest.raises(UsageError, match="holds no finished checkpoint"):
        planning.find_upstream(str(run_of("evaluate", settings).relative_to(checkout)), settings)
    twin = run.with_name(run.name[:8] + "00000000")
    twin.mkdir()
    with pytest.raises(UsageError, match="fits 2 runs"):
        planning.find_upstream(run.name[:8], settings)
    with pytest.raises(UsageError, match="pretrain starts from nothing"):
        planning.plan(settings, start="pretrain", upstream=run)


def test_expected_tokens_by_hand(checkout: Path) -> None:
    settings = planning.load_profile("scratch", overrides={"pretrain.train_steps": 3, "evaluate.samples_per_prompt": 2})
    pretrain, rl, evaluate = settings.pretrain, settings.rl_40k, settings.evaluate
    tokens = 3 * pretrain.global_batch_size * pretrain.sequence_length
    costs = planning.expected(settings)
    assert (costs["pretrain"].tokens, costs["pretrain"].bound) == (tokens, False)
    longest = rl.train_steps * rl.prompts_per_step * rl.group_size * (rl.max_prompt_length + rl.windows[0])
    assert (costs["rl-40k"].tokens, costs["rl-40k"].bound) == (longest, True)
    answers = 5 * len(settings.synthesize.tasks) * evaluate.prompts_per_task * 2
    expected = answers * (rl.max_prompt_length + evaluate.max_new_tokens)
    assert (costs["evaluate"].tokens, costs["evaluate"].bound) == (expected, True)
    assert "corpus" not in costs
    assert {row.stage: row.cost for row in planning.plan(settings) if row.cost is not None} == costs
