"""The project's view of an MLflow server: one experiment per profile, one parent run per flow run, one nested run per
stage. Runs are addressed by id through MlflowClient; no process-wide "active run" is used.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from m1 import paths
from m1.config.profile import Profile
from m1.errors import UsageError
from m1.run.contract import StageRequest, load_result
from m1.run.registry import stage as stage_record
from m1.run.summary import StageRow
from m1.tracking import records, registry
from m1.tracking.server import TAG_LENGTH, Server
from m1.tracking.stage_run import StageTracker, origin_tags

#: Digits that name a run. Fewer are no id: `m1-tiny/99` is a version, there or not, never the run that begins with 99.
SHORTEST_RUN_ID = 4
_PARAMETERS_PER_REQUEST = 100


class Tracker(Server):
    """Records flow runs and their stages. Make one with `connect`."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._profiles: dict[str, Profile] = {}

    def start_flow_run(self, profile: Profile, prefect_run_id: str, prefect_url: str | None) -> str:
        """Open the parent run of a flow run, in the experiment `m1-<profile>`, and close what dead ones left open.

        Returns:
            its MLflow run id.
        """
        from mlflow.entities import ViewType

        with registry.service(self.uri):
            experiment = self._experiment(profile.name)
            # One flow run per profile at a time: whatever is RUNNING now belongs to a process that is gone.
            for stale in self.runs(experiment, "attributes.status = 'RUNNING'", ViewType.ALL):
                self.tag(stale.info.run_id, {"error": f"still RUNNING when flow run {prefect_run_id} started"})
                self.client.set_terminated(stale.info.run_id, "KILLED")
            tags = {
                "profile": profile.name,
                "prefect_run_id": prefect_run_id,
                "prefect_url": prefect_url or "",
                **self._code_tags(),
                "mlflow.note.content": f"Flow run of profile `{profile.name}`; its stages are the nested runs. "
                + (f"Prefect: {prefect_url}" if prefect_url else ""),
            }
            name = f"{registry.model_name(profile.name)}-{prefect_run_id[:8]}"
            run = self.client.create_run(experiment, run_name=name, tags=_filled(tags))
            self._log_profile(run.info.run_id, profile)
            self._profiles[run.info.run_id] = profile
            return run.info.run_id

    def start_stage(
        self,
        flow_run_id: str,
        stage: str,
        request: StageRequest | None,
        attempt: int = 0,
        profile: Profile | None = None,
    ) -> StageTracker:
        """Open the nested run of a stage; a later attempt continues the run of the one before.

        Args:
            request: None for a data stage.
            attempt: rises with every try of the stage in this flow run.
            profile: by default the request's, or the one that `start_flow_run` was given.
        """
        settings = profile or (request.load_profile() if request else self._profiles.get(flow_run_id))
        assert settings is not None, "name the profile of a data stage whose flow run another Tracker opened"
        with registry.service(self.uri):
            flow = self.client.get_run(flow_run_id)
            experiment = flow.info.experiment_id
            earlier = self.runs(experiment, f"tags.`mlflow.parentRunId` = '{flow_run_id}' and tags.stage = '{stage}'")
            if attempt and (run := next(earlier, None)) is not None:
                self.client.update_run(run.info.run_id, status="RUNNING")
                self.tag(run.info.run_id, {"attempt": str(attempt)})
                return StageTracker(self, self.client.get_run(run.info.run_id), settings, stage, request)
            tags = {
                "mlflow.parentRunId": flow_run_id,
                "stage": stage,
                "profile": settings.name,
                "attempt": str(attempt),
                "prefect_run_id": flow.data.tags.get("prefect_run_id", ""),
                "prefect_url": flow.data.tags.get("prefect_url", ""),
                **self._code_tags(),
            }
            if request is not None:
                tags |= {"fingerprint": request.fingerprint, "path": records.relative(request.output)}
                tags |= self._upstream_tags(request, settings.name)
                tags |= {f"dvc.{name}": digest for name, digest in request.data_digests.items()}
                tags |= origin_tags(request)
            name = f"{stage}-{request.fingerprint[:8]}" if request else stage
            run = self.client.create_run(experiment, run_name=name, tags=_filled(tags))
            self._log_parameters(run.info.run_id, settings, stage)
            self._log_profile(run.info.run_id, settings)
            self._log_inputs(run.info.run_id, settings.name, stage, request)
            return StageTracker(self, self.client.get_run(run.info.run_id), settings, stage, request)

    def finish_flow_run(
        self,
        flow_run_id: str,
        status: str,
        rows: Sequence[StageRow],
        *,
        total_seconds: float | None = None,
        artifacts: Sequence[Path] = (),
    ) -> None:
        """Close the parent run with its summary table.

        Args:
            status: "FINISHED", "FAILED" or "KILLED".
            total_seconds: of the flow run; by default since the parent run was opened.
            artifacts: files to keep with the run, such as the report.
        """
        from mlflow.entities import Metric

        with registry.service(self.uri):
            run = self.client.get_run(flow_run_id)
            total = total_seconds if total_seconds is not None else time.time() - run.info.start_time / 1000
            own = sum(row.seconds for row in rows)
            metrics = {
                "total_seconds": total,
                "stage_seconds": own,
                "orchestration_share": max(0.0, 1 - own / total) if total > 0 else 0.0,
                "stages_run": float(sum(row.status == "ran" for row in rows)),
                "stages_skipped": float(sum(row.status == "skipped" for row in rows)),
            }
            now = int(time.time() * 1000)
            self.client.log_batch(flow_run_id, [Metric(name, value, now, 0) for name, value in metrics.items()])
            content = {"status": status, "metrics": metrics, "stages": [row.to_json() for row in rows]}
            self.client.log_text(flow_run_id, json.dumps(content, indent=1), "summary.json")
            self.client.log_text(flow_run_id, summary_table(rows), "summary.md")
            for file in artifacts:
                self.client.log_artifact(flow_run_id, str(file))
            self.client.set_terminated(flow_run_id, status)

    def find_run(self, upstream: str, profile: Profile | str) -> Path:
        """Run folder of a stage that finished.

        Args:
            upstream: MLflow run id (or its first digits, four at least, that name one run folder), MLflow run name, or
                `model@alias`.

        Raises:
            UsageError: there is no such run, there are several, or its folder is gone; it lists what there is.
        """
        profile_name = profile if isinstance(profile, str) else profile.name
        with registry.service(self.uri):
            runs = self.matching_runs(upstream, profile_name)
            folders = {run.data.tags["path"]: run for run in runs if "fingerprint" in run.data.tags}
            if len(folders) != 1:
                what = "matches several runs" if folders else "is no run of a stage that leaves a run folder"
                raise UsageError(f"upstream={upstream!r} {what} of profile {profile_name}", self._choices(profile_name))
        (path, run), *_ = folders.items()
        folder = paths.ROOT / path  # an absolute path stays as it is
        result = load_result(folder)
        if result is None or result.fingerprint != run.data.tags["fingerprint"]:
            fault = "has no finished result" if result is None else "holds another run's result"
            raise UsageError(f"upstream={upstream!r}: its folder {folder} {fault}", "Rerun it, or name another.")
        return folder

    def matching_runs(self, reference: str, profile_name: str) -> list[Any]:
        """MLflow runs of the profile's experiment that `reference` (see `find_run`) can mean."""
        from mlflow.exceptions import MlflowException

        if "@" in reference:
            name, alias = reference.rsplit("@", 1)
            try:
                version = self.client.get_model_version_by_alias(name, alias)
                if version.tags.get("profile") != profile_name:
                    return []
                return [self.client.get_run(version.run_id)] if version.run_id else []
            except MlflowException as error:
                if registry.is_missing(error) or getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":
                    return []
                raise
        experiment = self.client.get_experiment_by_name(registry.model_name(profile_name))
        if experiment is None or not reference:
            return []
        runs = list(self.runs(experiment.experiment_id, ""))
        named = [run for run in runs if run.info.run_name == reference]
        if named or len(reference) < SHORTEST_RUN_ID:
            return named
        return [run for run in runs if run.info.run_id.startswith(reference.lower())]

    def _experiment(self, profile_name: str) -> str:
        from mlflow.exceptions import MlflowException

        name = registry.model_name(profile_name)
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name)
            except MlflowException as error:
                if not registry.exists_already(error):
                    raise
                found = self.client.get_experiment_by_name(name)
        assert found is not None
        if found.lifecycle_stage == "deleted":  # in the UI's bin, from where its name stays taken
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _code_tags(self) -> dict[str, str]:
        revision = records.git_revision()
        return {
            "git_commit": revision.commit,
            "git_dirty": str(revision.dirty).lower(),
            "mlflow.source.git.commit": revision.commit if revision.commit != "none" else "",
        }

    def _upstream_tags(self, request: StageRequest, profile_name: str) -> dict[str, str]:
        if request.parent is None:
            return {}
        fingerprint = self.parent_fingerprint(request.parent)
        run = self.original_run(profile_name, fingerprint) if fingerprint else None
        return {
            "upstream_stage": request.parent_stage or "",
            "upstream_fingerprint": fingerprint or "missing",
            "upstream_run": run.info.run_id if run else "missing",
        }

    def _log_parameters(self, run_id: str, profile: Profile, stage: str) -> None:
        from mlflow.entities import Param

        values = profile.to_dict()
        record = stage_record(stage)
        names = dict.fromkeys((stage, *(part.partition(".")[0] for part in record.settings), "seed"))
        own = {name: values[name] for name in names}
        parameters = [Param(key[:250], text[:6000]) for key, text in flatten(own).items()]
        for start in range(0, len(parameters), _PARAMETERS_PER_REQUEST):
            self.client.log_batch(run_id, params=parameters[start : start + _PARAMETERS_PER_REQUEST])

    def _log_profile(self, run_id: str, profile: Profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "profile.yaml"
            file.write_text(yaml.safe_dump(profile.to_dict(), sort_keys=False))
            self.client.log_artifact(run_id, str(file))

    def _log_inputs(self, run_id: str, profile_name: str, stage: str, request: StageRequest | None) -> None:
        """The data sets a stage reads, and the checkpoint it starts from, as inputs of its run."""
        from mlflow.entities import LoggedModelInput

        from m1.tracking.datasets import dataset_input

        inputs = []
        for name in stage_record(stage).reads:
            record = records.locked(name, profile_name)
            digest = request.data_digests.get(name) if request else record.digest if record else None
            if digest is None:
                continue
            if record is None or record.digest != digest:  # dvc.lock has moved on: only the hash is certain
                folder = records.relative(paths.data_dir(profile_name, name))
                record = records.DataRecord(f"{name}@{profile_name}", folder, digest)
            inputs.append(dataset_input(record, "input"))
        models = []
        if request is not None and request.parent and (fingerprint := self.parent_fingerprint(request.parent)):
            version = registry.find_version(self.client, registry.model_name(profile_name), fingerprint)
            models = [LoggedModelInput(registry.model_id(version))] if version else []
        if inputs or models:
            self.client.log_inputs(run_id, datasets=inputs, models=models)

    def _choices(self, profile_name: str) -> str:
        """What `find_run` would accept, for an error message."""
        versions = self.client.search_model_versions(f"name = '{registry.model_name(profile_name)}'")
        newest: dict[str, Any] = {}
        for version in sorted(versions, key=lambda version: int(version.version)):
            newest[version.tags.get("stage", "?")] = version
        if not newest:
            return f"No stage of profile {profile_name} has finished in this MLflow yet; run `m1/full` first."
        known = [f"{v.name}@{stage} (run {(v.run_id or '?')[:8]})" for stage, v in newest.items()]
        return f"Choose a model, a run id or a run name; there are: {', '.join(known)}."


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys and texts; lists of scalars stay one value."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            flat |= flatten({str(index): item for index, item in enumerate(value)}, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def summary_table(rows: Sequence[StageRow]) -> str:
    """The rows as a Markdown table."""
    lines = ["| stage | state | time | key metric | before | after | output |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        before, after = ("" if value is None else f"{value:.4g}" for value in (row.before, row.after))
        cells = [row.stage, row.status, f"{row.seconds:.1f} s", row.key_metric, before, after, row.output]
        lines.append(f"| {' | '.join(cell or '' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _filled(tags: dict[str, str]) -> dict[str, str]:
    """MLflow refuses some empty tag values; an absent tag says the same."""
    return {key: value[:TAG_LENGTH] for key, value in tags.items() if value}
