"""The parts of the report's page, gathered from what is known of the stages."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from m1.config.profile import Profile
from m1.config.synthesize import Synthesize
from m1.run import registry
from m1.run.stage import Cost
from m1.tracking import records
from m1.tracking import report_words as words
from m1.tracking.report_page import (
    Accuracy,
    AccuracyRow,
    Cell,
    Change,
    Entry,
    Fact,
    Figure,
    LeftOut,
    Metric,
    Page,
    PlanRow,
    Shade,
    Sources,
    StageSection,
    StageView,
)
from m1.tracking.report_stages import Data, Run, Stage

#: What is shown of a raw source, where its summary has it.
_SOURCE_COLUMNS = {
    "name": "source",
    "package": "package",
    "version": "version",
    "licence": "licence",
    "license": "licence",
    "domain": "domain",
    "documents_kept": "documents kept",
    "bytes_kept": "bytes kept",
    "bytes": "bytes",
    "sha256": "SHA-256",
}


def page(settings: Profile, stages: Sequence[Stage], planned: Mapping[str, Cost], curves: list[Figure]) -> Page:
    """Everything that the template shows.

    Args:
        settings: those of the newest run.
        planned: by stage; may be empty.
        curves: figures that span stages.
    """
    views = {stage.name: _view(settings, stage) for stage in stages}
    sections = [_section(stage, views[stage.name]) for stage in stages if stage.done]
    rows = [_plan_row(stage, planned.get(stage.name)) for stage in stages if stage.run is not None]
    table = accuracy(stages, _tasks(settings))
    return Page(
        profile=settings.name,
        facts=_facts(settings, stages),
        introduction=_introduction(settings),
        left_out=_left_out(stages),
        mixed=_mixed(stages),
        kinds=[kind for kind in words.KINDS if any(view.kind == kind for view in views.values())],
        stages=list(views.values()),
        plan=rows,
        curves=curves,
        accuracy=table,
        sections=sections,
        glossary=[Fact(word, meaning) for word, meaning in words.GLOSSARY.items()],
        contents=_contents(sections, plan=bool(rows), across=bool(curves or table)),
    )


def _contents(sections: Sequence[StageSection], plan: bool, across: bool) -> list[Entry]:
    return [
        Entry("flow", "The flow"),
        Entry("overview", "Overview"),
        *([Entry("plan", "Plan and actual")] if plan else []),
        *([Entry("across", "Across the stages")] if across else []),
        Entry("stages", "Stage by stage"),
        *(Entry(section.view.anchor, section.view.name, section.view.kind) for section in sections),
        Entry("glossary", "Glossary"),
    ]


# --- the head of the page -------------------------------------------------------------------------------------------


def _facts(settings: Profile, stages: Sequence[Stage]) -> list[Fact]:
    runs = [stage.run for stage in stages if stage.run is not None]
    facts = [Fact("Stages done", f"{sum(stage.done for stage in stages)} of {len(stages)}")]
    if runs:
        finished = time.localtime(max(run.result.finished_at for run in runs))
        facts.append(Fact("Newest result", time.strftime("%Y-%m-%d %H:%M %Z", finished)))
        facts.append(Fact("Time in the stages", words.duration(sum(run.result.seconds for run in runs))))
    return [*facts, Fact("Seed", str(settings.seed))]


def _introduction(settings: Profile) -> str:
    model = settings.model
    softmax = sum(model.is_softmax_layer(index) for index in range(model.num_layers))
    return (
        "This page follows one language model from raw text to a checkpoint trained with reinforcement learning, in "
        f"the order of the MiniMax-M1 recipe. The model has {model.num_layers} layers, {softmax} with softmax and "
        f"{model.num_layers - softmax} with lightning attention, {model.num_experts} experts of which each token uses "
        f"{model.moe_router_topk}, hidden size {model.hidden_size:,} and a vocabulary of {model.vocab_size:,}."
    )


def _left_out(stages: Sequence[Stage]) -> list[LeftOut]:
    """One entry for all the stages that say the same."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        for sentence in stage.left_out:
            found.setdefault(sentence, []).append(stage.name)
    return [LeftOut(sentence, names) for sentence, names in found.items()]


def _mixed(stages: Sequence[Stage]) -> list[str]:
    """Warnings where the newest run of a stage was not made from the newest run of its parent or the newest data."""
    newest = {stage.name: stage.run.folder.name for stage in stages if stage.run is not None}
    recorded = {stage.name: stage.data.record.digest for stage in stages if stage.data is not None}
    found = []
    stale: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        run = stage.run
        if run is None:
            continue
        parent = run.parent
        if parent is not None and run.parent_stage in newest and parent.name != newest[run.parent_stage]:
            found.append(
                f"The newest {stage.name} started from an earlier {run.parent_stage} run ({parent.name}), not from the "
                "newest one shown here."
            )
        for data, digest in run.digests.items():
            if digest != recorded.get(data, digest):
                stale.setdefault((data, digest), []).append(stage.name)
    for (data, digest), readers in stale.items():
        found.append(
            f"The newest {_listed(readers)} read an earlier {data} data set ({digest[:12]}), not the one shown here."
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# --- one stage in the flow and in the tables ------------------------------------------------------------------------


def _view(settings: Profile, stage: Stage) -> StageView:
    record = registry.stage(stage.name)
    parent = None if record.makes_data else registry.parent_of(settings, stage.name)
    change = None
    if stage.run is not None:
        result = stage.run.result
        before, after = words.numbers([result.before, result.after])
        change = Change(result.key_metric, before, after)
    return StageView(
        number=stage.number,
        name=stage.name,
        kind=record.kind.value,
        about=record.about,
        anchor=f"stage-{stage.name}" if stage.done else "",
        inputs=[*([parent] if parent else []), *record.reads_of(settings)],
        time=words.duration(stage.run.result.seconds) if stage.run is not None else "",
        change=change,
        digest=stage.data.record.digest[:12] if stage.data is not None else "",
        tokens=words.count(stage.tokens),
        partial=bool(stage.left_out),
    )


def _plan_row(stage: Stage, planned: Cost | None) -> PlanRow:
    assert stage.run is not None
    tokens, seconds = stage.run.tokens, stage.run.result.seconds
    plan = planned or Cost(0)
    flops = plan.flops / plan.tokens * tokens if plan.flops and plan.tokens and tokens is not None else None
    return PlanRow(
        stage=stage.name,
        steps_planned=words.count(plan.steps),
        last_step=words.count(max((line.step for line in stage.run.lines), default=None)),
        tokens_planned=words.count(plan.tokens or None),
        bound=plan.bound,
        tokens=words.count(tokens),
        share=words.share(tokens, plan.tokens or None),
        flops_planned=words.power(plan.flops or None),
        flops=words.power(flops),
        time=words.duration(seconds),
        speed=words.count(tokens / seconds if tokens and seconds else None),
    )


def _tasks(settings: Profile) -> list[str]:
    made = settings.find("synthesize", Synthesize)
    return list(made.tasks) if made else []


def accuracy(stages: Sequence[Stage], tasks: Sequence[str]) -> Accuracy | None:
    """Held-out accuracy of the evaluated checkpoints, from final metrics whose key holds a task's name.

    What remains of the key names the checkpoint: "pass@1/sft/arithmetic" and "sft/pass@1/arithmetic" belong to "sft".
    """
    metrics = next((s.run.result.metrics for s in stages if s.name == "evaluate" and s.run is not None), {})
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        parts = key.split("/")
        task = next((part for part in parts if part in (*tasks, "mean")), None)
        if task is not None and re.search(r"pass|acc|solve", key):
            rest = [part for part in parts if part != task and part != "pass@1"]
            found.setdefault("/".join(rest) or "result", {})[task] = value
    shown = [task for task in ("mean", *tasks) if any(task in row for row in found.values())]
    if not any(task in tasks for task in shown):
        return None
    rows = [AccuracyRow(task.replace("_", " "), [_shade(row.get(task)) for row in found.values()]) for task in shown]
    return Accuracy(list(found), rows)


def _shade(rate: float | None) -> Shade | None:
    value = words.decimals(rate, 2)
    return None if value is None else Shade(value, round(10 * min(1.0, max(0.0, value.exact))))


# --- stage by stage -------------------------------------------------------------------------------------------------


def _section(stage: Stage, view: StageView) -> StageSection:
    if stage.run is not None:
        return _of_run(stage.run, view)
    assert stage.data is not None
    return _of_data(stage.data, view)


def _of_data(data: Data, view: StageView) -> StageSection:
    record = data.record
    return StageSection(
        view=view,
        facts=[Fact("Folder", record.path), Fact("DVC hash", record.digest), Fact("Command", record.command)],
        left_out=list(data.left_out),
        notes=[note for note in data.notes if note not in data.left_out],
        figures=[],
        missing=[],
        sources=_sources(record),
        metrics_title="Numbers of the data set",
        metrics=_metrics(data.numbers),
    )


def _of_run(run: Run, view: StageView) -> StageSection:
    from m1.tracking.pictures import embedded

    result = run.result
    drawn = {name: embedded(run.folder / name, view.name) for name in result.figures}
    facts = [Fact("Run folder", records.relative(run.folder)), Fact("Fingerprint", result.fingerprint)]
    if run.parent is not None:
        facts.append(Fact("Started from", f"{run.parent_stage} {run.parent.name}"))
    if run.digests:
        facts.append(Fact("Read", ", ".join(f"{name} {digest[:12]}" for name, digest in run.digests.items())))
    return StageSection(
        view=view,
        facts=facts,
        left_out=list(result.left_out),
        notes=[note for note in result.notes if note not in result.left_out],
        figures=[figure for figure in drawn.values() if figure is not None],
        missing=[Path(name).name for name, figure in drawn.items() if figure is None],
        sources=None,
        metrics_title="All final metrics",
        metrics=_metrics(result.metrics),
    )


def _metrics(values: Mapping[str, float]) -> list[Metric]:
    shown = [(name, words.number(value)) for name, value in values.items()]
    return [Metric(name, value) for name, value in shown if value is not None]


def _sources(record: records.DataRecord) -> Sources | None:
    if not record.sources:
        return None
    keys = [key for key in _SOURCE_COLUMNS if any(key in source for source in record.sources)]
    numeric = {key: all(_is_number(source.get(key, 0)) for source in record.sources) for key in keys}
    licences = {str(source[key]) for source in record.sources for key in ("licence", "license") if source.get(key)}
    return Sources(
        columns=[Cell(_SOURCE_COLUMNS[key], numeric[key]) for key in keys],
        rows=[[_cell(source.get(key), numeric[key]) for key in keys] for source in record.sources],
        licences=sorted(licences),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: str | float | None, numeric: bool) -> Cell:
    if value is None:
        return Cell("", numeric)
    return Cell(f"{value:,}" if numeric else str(value), numeric)


__all__ = ["accuracy", "page"]
