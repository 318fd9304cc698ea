"""The project's view of an MLflow server: one experiment per profile, one parent run per flow run, one nested run per
stage. Runs are addressed by id through MlflowClient; no process-wide "active run" is used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m1 import paths
from m1.config.profile import Profile
from m1.errors import UsageError
from m1.run.contract import StageRequest, load_result
from m1.run.summary import StageRow
from m1.tracking import flow_run, reconcile, registry
from m1.tracking.server import Server
from m1.tracking.stage_run import StageTracker
from m1.tracking.stage_start import open_stage

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

#: Digits that name a run. Fewer are no id: `m1-tiny/99` is a version, there or not, never the run that begins with 99.
SHORTEST_RUN_ID = 4


class Tracker(Server):
    """Records flow runs and their stages. Make one with `connect`."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._profiles: dict[str, Profile] = {}
        self._flow_runs: dict[str, Run] = {}

    def start_flow_run(
        self, profile: Profile, prefect_run_id: str, prefect_url: str | None, stages: Sequence[str] = ()
    ) -> str:
        """Open the parent run of a flow run, in the experiment `m1-<profile>`, and close what dead ones left open.

        Args:
            stages: those of the plan, in order.

        Returns:
            its MLflow run id.

        Raises:
            ServiceError: MLflow did not take something.
        """
        with registry.service(self.uri):
            if (where := self.experiment_id(profile.name)) is not None:
                reconcile.finish_stages(self, where)
            run_id = flow_run.open_run(self, profile, prefect_run_id, prefect_url, stages)
        self._profiles[run_id] = profile
        return run_id

    def close_dead(self, alive: Collection[str]) -> list[str]:
        """Close what is RUNNING in any profile's experiment although no process serves it.

        Args:
            alive: ids in Prefect of the flow runs that a process serves.

        Returns:
            names of the flow runs that were closed.

        Raises:
            ServiceError: MLflow did not take something.
        """
        with registry.service(self.uri):
            found = self.client.search_experiments(filter_string=f"name LIKE '{registry.model_name('%')}'")
            return [name for each in found for name in reconcile.close_dead(self, each.experiment_id, alive)]

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

        Raises:
            ServiceError: MLflow did not take something.
        """
        settings = profile or (request.load_profile() if request else self._profiles.get(flow_run_id))
        assert settings is not None, "name the profile of a data stage whose flow run another Tracker opened"
        with registry.service(self.uri):
            if flow_run_id not in self._flow_runs:
                self._flow_runs[flow_run_id] = self.client.get_run(flow_run_id)
            return open_stage(self, self._flow_runs[flow_run_id], stage, request, attempt, settings)

    def finish_flow_run(
        self,
        flow_run_id: str,
        status: str,
        rows: Sequence[StageRow],
        *,
        total_seconds: float | None = None,
        report: Path | None = None,
    ) -> None:
        """Close the parent run: metrics, summary, figures, data sets and checkpoints, and a description of it all.

        Args:
            status: "FINISHED", "FAILED" or "KILLED".
            rows: of the stages that have ended; one that was stopped is added from its own run.
            total_seconds: of the flow run; by default since the parent run was opened.
            report: file of the report, kept with the run.

        Raises:
            ServiceError: MLflow did not take something.
        """
        profile = self._profiles.get(flow_run_id)
        with registry.service(self.uri):
            flow_run.close_run(self, profile, flow_run_id, status, rows, total_seconds, report)

    def find_run(self, upstream: str, profile: Profile | str) -> Path:
        """Run folder of a stage that finished.

        Args:
            upstream: MLflow run id (or its first digits, four at least, that name one run folder), MLflow run name, or
                `model@alias`.

        Raises:
            UsageError: there is no such run, there are several, or its folder is gone; it lists what there is.
            ServiceError: MLflow does not answer.
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

    def matching_runs(self, reference: str, profile_name: str) -> list[Run]:
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

    def _choices(self, profile_name: str) -> str:
        """What `find_run` would accept, for an error message."""
        versions = self.client.search_model_versions(f"name = '{registry.model_name(profile_name)}'")
        newest: dict[str, ModelVersion] = {}
        for version in sorted(versions, key=lambda version: int(version.version)):
            newest[version.tags.get("stage", "?")] = version
        if not newest:
            return f"No stage of profile {profile_name} has finished in this MLflow yet; run `m1/full` first."
        known = [f"{v.name}@{stage} (run {(v.run_id or '?')[:8]})" for stage, v in newest.items()]
        return f"Choose a model, a run id or a run name; there are: {', '.join(known)}."
