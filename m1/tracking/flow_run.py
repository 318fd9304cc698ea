"""The parent run of a flow run: opened when the flow begins, closed with its table, its figures and what it gained."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m1 import paths
from m1.config.profile import Profile
from m1.errors import M1Error
from m1.run.contract import StageResult, load_result
from m1.run.registry import data_stages, stage
from m1.run.stage import Kind
from m1.run.summary import StageRow
from m1.tracking import experiment, glossary, notes, pages, records, registry
from m1.tracking.kept import METRICS_FILE, PROFILE_FILE, code_tags, flatten, keep_figure, log_profile
from m1.tracking.markdown import Picture, link
from m1.tracking.metrics import metric_key
from m1.tracking.notes import DataLine, FlowFacts, Solved, StageLine
from m1.tracking.server import Server, fitting, page_of

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Run

REPORT = "report.html"
#: A final metric that is the share of held-out tasks which the checkpoint of a stage solves.
_SOLVED = re.compile(r"(?:(?P<family>[^/]+)/)?pass@1/(?P<stage>[^/]+)/mean")


@dataclass(frozen=True)
class Ended:
    """What the end of a flow run is made known from.

    Attributes:
        status: "RUNNING", "FINISHED", "FAILED" or "KILLED".
        seconds: since its start.
        error: what ended it, where no stage says so.
    """

    status: str
    seconds: float
    error: str = ""

    def outside(self, rows: Iterable[StageRow]) -> float:
        """Share of the time that was spent outside the stages."""
        return max(0.0, 1 - sum(row.seconds for row in rows) / self.seconds) if self.seconds > 0 else 0.0


def open_run(
    server: Server, profile: Profile, prefect_run_id: str, prefect_url: str | None, stages: Sequence[str]
) -> str:
    """Open a flow run's parent run and close what dead ones have left open; returns its id.

    Args:
        stages: those of the plan.
    """
    from mlflow.entities import ViewType

    where = experiment.open_experiment(server, profile)
    # One flow run per profile at a time: whatever is RUNNING now belongs to a process that is gone.
    stale = list(server.runs(where, "attributes.status = 'RUNNING'", ViewType.ALL))
    for run in sorted(stale, key=lambda run: "stage" not in run.data.tags):  # a flow run tells of its stages' ends
        close_stale(server, run, f"its process was gone when flow run {prefect_run_id} began")
    revision = records.git_revision()
    tags = {
        "profile": profile.name,
        experiment.LEVEL: experiment.FLOW_LEVEL,
        "stages": ", ".join(stages),
        "prefect_run_id": prefect_run_id,
        "prefect_url": prefect_url or "",
        **code_tags(revision),
        "mlflow.source.name": f"m1 run --profile {profile.name}",
    }
    name = f"{registry.model_name(profile.name)}-{prefect_run_id[:8]}"
    run = server.client.create_run(where, run_name=name, tags=fitting(tags))
    note = notes.flow_note(_facts(server, run, Ended("RUNNING", 0.0), [], ()))
    server.log(run.info.run_id, parameters=flatten(profile.to_dict()), note=note)
    log_profile(server, run.info.run_id, profile)
    newest = f"Newest flow run: running. Open {link(name, page_of(run))}"
    experiment.describe(server, where, profile, run.info.run_id, newest)
    return run.info.run_id


def refresh(server: Server, flow_run: str) -> None:
    """Write the description of a flow run that goes on anew."""
    run = server.client.get_run(flow_run)
    if run.info.status != "RUNNING":
        return  # it has told of its end
    ended = Ended("RUNNING", time.time() - run.info.start_time / 1000)
    nested = server.nested(run)
    done = [row for row in map(recorded_row, nested) if row is not None]
    server.log(flow_run, note=notes.flow_note(_facts(server, run, ended, done, nested)))


def close_run(
    server: Server,
    profile: Profile | None,
    flow_run: str,
    status: str,
    rows: Sequence[StageRow],
    total_seconds: float | None = None,
    report: Path | None = None,
) -> None:
    """Close a flow run: metrics, tables, figures, data sets, checkpoints, description.

    Args:
        profile: of the flow run; None where only MLflow is left to tell, and then the experiment is left as it is.
        rows: what the flow knows; stages it cannot tell of any more are added from their own runs.
        report: kept with the run.
    """
    from mlflow.entities import Metric

    run = server.client.get_run(flow_run)
    seconds = total_seconds if total_seconds is not None else time.time() - run.info.start_time / 1000
    ended = Ended(status, seconds, run.data.tags.get("error", ""))
    nested = server.nested(run)
    rows = _with_recorded(rows, nested)
    for each in nested:
        if each.info.status == "RUNNING":  # nobody is left who could end it
            server.log(each.info.run_id, tags={"state": "stopped"})
            server.client.set_terminated(each.info.run_id, "KILLED")
    results = [result for row in rows if (result := _result(row)) is not None]
    metrics = _metrics(ended, rows, results)
    content = {"status": status, "metrics": metrics, "stages": [row.to_json() for row in rows]}
    server.client.log_text(flow_run, json.dumps(content, indent=1), "summary.json")
    shown = {metric_key(name): value for name, value in metrics.items()}
    server.client.log_text(flow_run, glossary.table(shown, {}), METRICS_FILE)
    pictures = _keep_figures(server, run, results)
    _keep_inputs_and_outputs(server, flow_run, nested)
    if report is not None:
        server.log_file(flow_run, REPORT, report.read_bytes())
    facts = _facts(server, run, ended, rows, nested, solved(results), pictures, report is not None)
    text, now = notes.flow_note(facts), int(time.time() * 1000)
    logged = [Metric(metric_key(name), value, now, 0) for name, value in metrics.items()]
    server.log(flow_run, metrics=logged, note=text)
    server.client.log_text(flow_run, text + "\n", "summary.md")
    if profile is not None:
        told = ", ".join(part for part in (notes.outcome(facts), notes.gain(rows)) if part)
        newest = f"Newest flow run: {told}. Open {link(run.info.run_name, page_of(run))}"
        experiment.describe(server, run.info.experiment_id, profile, flow_run, newest)
    server.client.set_terminated(flow_run, status)


def close_stale(server: Server, run: Run, error: str) -> None:
    """End a run of a process that is gone, as far as MLflow's own records tell of it."""
    server.log(run.info.run_id, tags={"error": error, "state": "stopped"})
    if "stage" in run.data.tags:
        server.client.set_terminated(run.info.run_id, "KILLED")
    else:
        close_run(server, None, run.info.run_id, "KILLED", ())


def _with_recorded(rows: Sequence[StageRow], nested: Sequence[Run]) -> list[StageRow]:
    """The rows, and those of stages of which only their own runs tell, in the order in which they began."""
    recorded = [row for run in nested if (row := recorded_row(run, at_the_end=True)) is not None]
    merged = {row.stage: row for row in recorded}
    merged |= {row.stage: row for row in rows}  # a key that is there keeps its place
    return list(merged.values())


def recorded_row(run: Run, at_the_end: bool = False) -> StageRow | None:
    """What the run of a stage tells of it; None while it goes on, unless its flow run is at its end."""
    tags, metrics, info = run.data.tags, run.data.metrics, run.info
    if info.status == "RUNNING" and not at_the_end:
        return None
    ended = info.end_time or int(time.time() * 1000)
    reason = tags.get("skip_reason", "") if info.status == "FINISHED" else tags.get("error", "it was stopped")
    skipped = tags.get("skipped") == "true"
    return StageRow(
        tags.get("stage", info.run_name),
        ("skipped" if skipped else "ran") if info.status == "FINISHED" else "failed",
        reason,
        seconds=0.0 if skipped else (ended - info.start_time) / 1000,
        inside_seconds=metrics.get("seconds", 0.0),
        key_metric=tags.get("key_metric"),
        before=metrics.get("key/before"),
        after=metrics.get("key/after"),
        output=tags.get("path"),
        left_out=tuple(line for line in tags.get("left_out", "").splitlines() if line),
        mlflow_run=info.run_id,
    )


def _result(row: StageRow) -> StageResult | None:
    """The result that a row tells of, or None: it has none, or its folder is gone or damaged."""
    if row.output is None or row.status == "failed" or stage(row.stage).makes_data:
        return None
    try:
        return load_result(paths.ROOT / row.output)
    except M1Error:
        return None


def solved(results: Iterable[StageResult]) -> tuple[Solved, ...]:
    """Shares of held-out tasks that the checkpoints solve, of every family."""
    found = [
        Solved(match["family"] or "", match["stage"], value)
        for result in results
        for name, value in result.metrics.items()
        if (match := _SOLVED.fullmatch(name))
    ]
    return tuple(sorted(found, key=lambda each: each.family))


def _metrics(ended: Ended, rows: Sequence[StageRow], results: Sequence[StageResult]) -> dict[str, float]:
    """Metrics of a flow run under the names of the glossary."""
    metrics = {
        "total_seconds": ended.seconds,
        "stage_seconds": sum(row.seconds for row in rows),
        "orchestration_share": ended.outside(rows),
    }
    for name, status in (("stages_run", "ran"), ("stages_skipped", "skipped"), ("stages_failed", "failed")):
        metrics[name] = float(sum(row.status == status for row in rows))
    for each in solved(results):
        metrics[f"result/{each.family}/pass@1/{each.stage}".replace("//", "/")] = each.share
    for row in rows:
        metrics |= {f"seconds/{row.stage}": row.seconds} if row.status != "skipped" else {}
        parts = {"before": row.before, "after": row.after}
        metrics |= {f"key/{row.stage}/{part}": value for part, value in parts.items() if value is not None}
    return metrics


def _facts(
    server: Server,
    run: Run,
    ended: Ended,
    rows: Sequence[StageRow],
    nested: Sequence[Run],
    solved: tuple[Solved, ...] = (),
    pictures: tuple[Picture, ...] = (),
    with_report: bool = False,
) -> FlowFacts:
    tags, run_id, where = run.data.tags, run.info.run_id, run.info.experiment_id
    runs = {each.data.tags.get("stage", ""): each for each in nested}
    begun = {*runs, *(row.stage for row in rows)}
    planned = [name for name in tags.get("stages", "").split(", ") if name]
    command = f"`m1 report --profile {tags.get('profile', '')}` writes the report"
    return FlowFacts(
        profile=tags.get("profile", ""),
        status=ended.status,
        stages=tuple(_line(row, runs.get(row.stage)) for row in rows),
        seconds=ended.seconds,
        outside=ended.outside(rows),
        revision=records.Revision(tags.get("git_commit", "none"), tags.get("git_dirty") == "true"),
        error=ended.error,
        waiting=tuple(name for name in planned if name not in begun),
        solved=solved,
        data=_data_lines(server, tags.get("profile", ""), nested),
        pictures=pictures,
        prefect=tags.get("prefect_url"),
        profile_page=pages.artifact_page(where, run_id, PROFILE_FILE),
        report=link("report", pages.artifact_page(where, run_id, REPORT)) if with_report else command,
    )


def _line(row: StageRow, run: Run | None) -> StageLine:
    number = run.data.tags.get("number", "") if run else ""
    return StageLine(f"{number} {row.stage}".strip(), row, page_of(run) if run else None)


def _data_lines(server: Server, profile_name: str, nested: Sequence[Run]) -> tuple[DataLine, ...]:
    """Every data set that a stage of the flow run made or read."""
    digests: dict[str, str] = {}
    makers: dict[str, Run] = {}
    for run in nested:
        tags = run.data.tags
        if "dvc_digest" in tags:
            digests[tags["stage"]] = tags["dvc_digest"]
            makers[tags["stage"]] = run
        digests = {name: tags[f"dvc.{name}"] for name in data_stages() if f"dvc.{name}" in tags} | digests
    lines = []
    for name in (name for name in data_stages() if name in digests):
        maker = makers.get(name) or server.maker_of(profile_name, name, digests[name])
        lines.append(DataLine(f"{name}@{profile_name}", digests[name], page_of(maker) if maker else None))
    return tuple(lines)


def _keep_figures(server: Server, run: Run, results: Sequence[StageResult]) -> tuple[Picture, ...]:
    """Keep the figures that tell how the whole run went: the first of every stage that checks or reinforces."""
    found = []
    for result in results:
        if stage(result.stage).kind in (Kind.REINFORCEMENT, Kind.RESULT) and result.figures:
            file = result.request.run / result.figures[0]
            title = f"{result.stage}: {file.stem.replace('_', ' ')}"
            found += keep_figure(server, run, file, f"{result.stage}-{file.name}", title)
    return tuple(found)


def _keep_inputs_and_outputs(server: Server, flow_run: str, nested: Sequence[Run]) -> None:
    """Name the data sets and checkpoints of the stages with the flow run, where the table of runs shows them."""
    from mlflow.entities import LoggedModelOutput

    inputs: dict[tuple[str, str], DatasetInput] = {}
    for run in nested:
        for entry in run.inputs.dataset_inputs if run.inputs else []:
            inputs.setdefault((entry.dataset.name, entry.dataset.digest), entry)
    models = [entry.model_id for run in nested if run.outputs for entry in run.outputs.model_outputs]
    if inputs:
        server.client.log_inputs(flow_run, list(inputs.values()))
    if models:
        server.client.log_outputs(flow_run, [LoggedModelOutput(model, step=0) for model in dict.fromkeys(models)])
