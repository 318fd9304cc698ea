"""The beginning of a stage's MLflow run: what is known before any work is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m1 import paths
from m1.config.profile import Profile
from m1.run.contract import StageRequest
from m1.run.registry import stage as stage_record
from m1.tracking import experiment, notes, records, registry
from m1.tracking.kept import code_tags, flatten
from m1.tracking.server import NOTE, Server, fitting
from m1.tracking.stage_run import StageTracker, origin_tags

if TYPE_CHECKING:
    from mlflow.entities import Run


def open_stage(
    server: Server, flow: Run, stage: str, request: StageRequest | None, attempt: int, profile: Profile
) -> StageTracker:
    """Open the nested run of a stage; a later attempt continues the run of the one before."""
    where, flow_id = flow.info.experiment_id, flow.info.run_id
    earlier = server.runs(where, f"tags.`mlflow.parentRunId` = '{flow_id}' and tags.stage = '{stage}'")
    if attempt and (run := next(earlier, None)) is not None:
        server.client.update_run(run.info.run_id, status="RUNNING")
        server.log(run.info.run_id, tags={"attempt": str(attempt), "state": "running"})
        return StageTracker(server, server.client.get_run(run.info.run_id), profile, stage, request)
    title = experiment.title(profile, stage)
    tags = {
        "mlflow.parentRunId": flow_id,
        "mlflow.source.name": stage_record(stage).run,
        experiment.LEVEL: experiment.STAGE_LEVEL,
        "stage": stage,
        "number": title.partition(" ")[0],
        "state": "running",
        NOTE: notes.stage_note(notes.StageFacts(stage_record(stage).about, "runs")),
        "profile": profile.name,
        "attempt": str(attempt),
        "prefect_run_id": flow.data.tags.get("prefect_run_id", ""),
        "prefect_url": flow.data.tags.get("prefect_url", ""),
        **code_tags(records.git_revision()),
    }
    if request is not None:
        tags |= {"fingerprint": request.fingerprint, "path": records.relative(request.output)}
        tags |= _upstream_tags(server, request, profile.name)
        tags |= {f"dvc.{name}": digest for name, digest in request.data_digests.items()}
        tags |= origin_tags(request)
    name = f"{title} {request.fingerprint[:8]}" if request else title
    run = server.client.create_run(where, run_name=name, tags=fitting(tags))
    values = profile.to_dict()
    sections = (stage, *(part.partition(".")[0] for part in stage_record(stage).settings), "seed")
    server.log(run.info.run_id, parameters=flatten({name: values[name] for name in dict.fromkeys(sections)}))
    _log_inputs(server, run.info.run_id, profile, stage, request)
    return StageTracker(server, run, profile, stage, request)


def _upstream_tags(server: Server, request: StageRequest, profile_name: str) -> dict[str, str]:
    if request.parent is None:
        return {}
    fingerprint = server.parent_fingerprint(request.parent)
    run = server.original_run(profile_name, fingerprint) if fingerprint else None
    return {
        "upstream_stage": request.parent_stage or "",
        "upstream_fingerprint": fingerprint or "missing",
        "upstream_run": run.info.run_id if run else "missing",
    }


def _log_inputs(server: Server, run_id: str, profile: Profile, stage: str, request: StageRequest | None) -> None:
    """The data sets a stage reads, and the checkpoint it starts from, as inputs of its run."""
    from mlflow.entities import LoggedModelInput

    from m1.tracking.datasets import dataset_input

    inputs = []
    for name in stage_record(stage).reads_of(profile):
        record = records.locked(name, profile.name)
        digest = request.data_digests.get(name) if request else record.digest if record else None
        if digest is None:
            continue
        if record is None or record.digest != digest:  # dvc.lock has moved on: only the hash is certain
            folder = records.relative(paths.data_dir(profile.name, name))
            record = records.DataRecord(f"{name}@{profile.name}", folder, digest)
        inputs.append(dataset_input(record, "input"))
    models = []
    if request is not None and request.parent and (fingerprint := server.parent_fingerprint(request.parent)):
        version = registry.find_version(server.client, registry.model_name(profile.name), fingerprint)
        models = [LoggedModelInput(registry.model_id(version))] if version else []
    if inputs or models:
        server.client.log_inputs(run_id, datasets=inputs, models=models)
