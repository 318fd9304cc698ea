"""What the description of a stage's run says: gathered from the run, its request and its result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m1.config.profile import Profile
from m1.run.contract import StageRequest, StageResult
from m1.run.registry import data_stages, stage
from m1.tracking import notes, pages, records
from m1.tracking.kept import METRICS_FILE
from m1.tracking.markdown import Picture, code, link, plain
from m1.tracking.server import Server, page_of

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

_MISSING = "missing"


@dataclass(frozen=True)
class Subject:
    """The run that is described, and what it is a run of."""

    server: Server
    run: Run
    profile: Profile
    stage: str
    request: StageRequest | None


@dataclass(frozen=True)
class Ended:
    """How the stage went.

    Attributes:
        state, reason, seconds: as in `notes.StageFacts`.
        version: of its checkpoint in the model registry.
        record: of the data set it made.
        original: the run that did the work, where this one found it done.
    """

    state: str
    reason: str = ""
    seconds: float | None = None
    result: StageResult | None = None
    version: ModelVersion | None = None
    record: records.DataRecord | None = None
    original: Run | None = None
    pictures: tuple[Picture, ...] = ()


def note(subject: Subject, ended: Ended, names: Iterable[str]) -> str:
    """The description, in Markdown; `names` are the run's metrics in MLflow."""
    result, with_metrics = ended.result, (ended.original or subject.run).info
    facts = notes.StageFacts(
        about=stage(subject.stage).about,
        state=ended.state,
        reason=ended.reason,
        seconds=result.seconds if result and ended.state == "ran" else ended.seconds,
        key_metric=result.key_metric if result else None,
        before=result.before if result else None,
        after=result.after if result else None,
        notes=result.notes if result else (),
        left_out=result.left_out if result else tuple(_left_out(subject)),
        facts=tuple(_facts(subject, ended)),
        pictures=ended.pictures,
        names=tuple(names),
        metrics_page=pages.artifact_page(with_metrics.experiment_id, with_metrics.run_id, METRICS_FILE),
    )
    return notes.stage_note(facts)


def _left_out(subject: Subject) -> list[str]:
    makes_data = stage(subject.stage).makes_data
    return records.left_out(subject.profile.name, subject.stage) if makes_data else []


def _facts(subject: Subject, ended: Ended) -> Iterable[tuple[str, str]]:
    """Where the run comes from, and what it left."""
    tags, run = subject.run.data.tags, subject.run
    if ended.state == "skipped":
        done = link(ended.original.info.run_name, page_of(ended.original)) if ended.original else "outside a flow run"
        yield "done by", f"{done}: {plain(ended.reason)}"
    yield from _starts_from(subject)
    if data := "<br>".join(_data(subject)):
        yield "data", data
    if ended.record is not None:
        yield "made", f"{code(ended.record.name)} with DVC hash {code(ended.record.digest)}"
        if ended.record.sources:
            yield "raw sources", "<br>".join(map(_source, ended.record.sources))
    if ended.version is not None:
        name, number = ended.version.name, str(ended.version.version)
        model = link(f"{name} version {number}", pages.version_page(name, number))
        yield "checkpoint", f"{model}, alias {code(subject.stage)}"
    if folder := ended.record.path if ended.record else tags.get("path"):
        yield "folder", code(folder)
    changes = " with uncommitted changes" if tags.get("git_dirty") == "true" else ""
    yield "commit", f"{code(tags.get('git_commit', 'none')[:12])}{changes}"
    flow = pages.run_page(run.info.experiment_id, tags["mlflow.parentRunId"])
    prefect = f" · {link('in Prefect', tags['prefect_url'])}" if tags.get("prefect_url") else ""
    yield "part of", f"{link('flow run', flow)}{prefect}"


def _starts_from(subject: Subject) -> Iterable[tuple[str, str]]:
    tags, where = subject.run.data.tags, subject.run.info.experiment_id
    if "init_from_folder" in tags:
        folder, digest = tags["init_from_folder"], tags["init_from_digest"]
        yield "starts from", f"base model {code(folder)}, digest {code(digest[:16])}"
    elif "upstream_stage" in tags:
        run = tags.get("upstream_run", _MISSING)
        upstream = link(tags["upstream_stage"], None if run == _MISSING else pages.run_page(where, run))
        yield "starts from", f"{upstream}, fingerprint {code(tags.get('upstream_fingerprint', _MISSING)[:16])}"


def _data(subject: Subject) -> Iterable[str]:
    """Every data set that the stage reads, with the run that made it."""
    request, name = subject.request, subject.profile.name
    digests = dict(request.data_digests) if request else {}
    if request is None:
        read = [(each, records.locked(each, name)) for each in stage(subject.stage).reads_of(subject.profile)]
        digests = {each: record.digest for each, record in read if record is not None}
    for each in (each for each in data_stages() if each in digests):
        maker = subject.server.maker_of(name, each, digests[each])
        yield f"{link(f'{each}@{name}', page_of(maker) if maker else None)} {code(digests[each])}"


def _source(source: records.Source) -> str:
    """A raw source in one line."""
    name = str(source.get("name", ""))
    parts = [source.get("package"), source.get("version"), source.get("licence") or source.get("license")]
    told = ", ".join(str(part) for part in parts if part)
    kept = source.get("documents_kept")
    return plain(f"{name}: {told}" + (f", {kept} documents" if kept is not None else ""))
