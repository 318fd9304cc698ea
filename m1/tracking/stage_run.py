"""The MLflow run of one stage: opened by `Tracker.start_stage`, closed by one of finish, finish_data, skip or fail."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m1 import paths
from m1.config.profile import Profile
from m1.errors import UsageError
from m1.run.contract import StageRequest, StageResult
from m1.tracking import records, registry
from m1.tracking.metrics import MAX_KEYS, Follower, MetricKeys
from m1.tracking.server import Server

logger = logging.getLogger(__name__)


class StageTracker:
    """One stage's run.

    Attributes:
        run_id: MLflow run id.
        url: page of the run in the MLflow UI.
    """

    def __init__(self, tracker: Server, run: Any, profile: Profile, stage: str, request: StageRequest | None) -> None:
        self._tracker, self._client, self._run = tracker, tracker.client, run
        self._profile, self._stage, self._request = profile, stage, request
        self.run_id: str = run.info.run_id
        self.url = tracker.url(run)
        self._keys = MetricKeys(set(run.data.metrics))
        self._follower: Follower | None = None

    def follow(self) -> None:
        """Forward the run folder's metrics.jsonl from now on, in the background; a fault shows at `finish`."""
        assert self._request is not None, "a data stage writes no metrics.jsonl"
        file = Path(self._request.output) / "metrics.jsonl"
        self._follower = Follower(self._client, self.run_id, file, self._keys, set(self._run.data.metrics))
        self._follower.start()

    def finish(self, result: StageResult) -> None:
        """Record a complete stage: metrics, figures, log, and its checkpoint as a model version with the stage's alias.

        Raises:
            ServiceError: MLflow did not take something. The run folder is complete nevertheless; the next flow run
                skips the stage and registers its checkpoint then.
        """
        assert self._request is not None
        folder = Path(self._request.output)
        last_step = 0
        if self._follower is not None:
            self._follower.stop()
            last_step = self._follower.last_step
        with registry.service(self._tracker.uri):
            for name in ("result.json", "log.txt"):
                if (folder / name).is_file():
                    self._client.log_artifact(self.run_id, str(folder / name))
            for figure in result.figures:
                if (folder / figure).is_file():
                    self._client.log_artifact(self.run_id, str(folder / figure), "figures")
            version = self._register(result, self._run) if result.checkpoint else None
            finals = {"seconds": result.seconds, "key/before": result.before, "key/after": result.after}
            # Where there are too many names, what repeats a curve is left out first.
            ordered = sorted(result.metrics, key=self._keys.__contains__)
            finals |= {f"final/{name}": result.metrics[name] for name in ordered}
            self._log_finals(finals, last_step, registry.model_id(version) if version else None)
            self._tag(key_metric=result.key_metric, notes="\n".join(result.notes))
            if version is not None:
                self._point_alias(version)
            self._client.set_terminated(self.run_id, "FINISHED")

    def finish_data(self, stage: str, profile: Profile) -> None:
        """Record a complete data stage, after DVC has recorded its output.

        Raises:
            UsageError: dvc.lock has no entry for it.
        """
        started = self._run.info.start_time / 1000
        with registry.service(self._tracker.uri):  # before the summary, which may be long
            self._log_finals({"seconds": time.time() - started}, 0, None)
        self._record_data(stage, profile)
        with registry.service(self._tracker.uri):
            self._client.set_terminated(self.run_id, "FINISHED")

    def skip(self, result: StageResult | None, reason: str) -> None:
        """Record that the stage's work was already done.

        Args:
            result: what the stage left earlier; its version gets the stage's alias again. None for a data stage.
            reason: one line for the reader of the run.
        """
        with registry.service(self._tracker.uri):
            self._tag(skipped="true", skip_reason=reason)
        if result is None:
            self._record_data(self._stage, self._profile)
        else:
            with registry.service(self._tracker.uri):
                original = self._tracker.original_run(self._profile.name, result.fingerprint, apart_from=self.run_id)
                if original is not None:
                    self._tag(original_run=original.info.run_id, original_url=self._tracker.url(original))
                self._tag(key_metric=result.key_metric)
                self._log_finals({"key/before": result.before, "key/after": result.after}, 0, None)
                if result.checkpoint:
                    name = registry.model_name(self._profile.name)
                    version = registry.find_version(self._client, name, result.fingerprint)
                    # No version: the server died as the stage ended, and the run that did the work is known; or the
                    # stage ran outside a flow, and nobody noted the commit.
                    self._point_alias(version or self._register(result, original))
        with registry.service(self._tracker.uri):
            self._client.set_terminated(self.run_id, "FINISHED")

    def fail(self, message: str, *, killed: bool = False) -> None:
        """Close the run as FAILED (or KILLED). Never raises: the stage's own error is what the user must see."""
        try:
            if self._follower is not None:
                self._follower.stop()
        except Exception as error:
            logger.warning("%s", error)
        try:
            with registry.service(self._tracker.uri):
                self._tag(error=message)
                if self._request is not None and (log := Path(self._request.output) / "log.txt").is_file():
                    self._client.log_artifact(self.run_id, str(log))
                self._client.set_terminated(self.run_id, "KILLED" if killed else "FAILED")
        except Exception as error:
            logger.warning("%s", error)

    def _record_data(self, stage: str, profile: Profile) -> None:
        from m1.tracking.datasets import dataset_input

        record = records.locked(stage, profile.name)
        if record is None:
            raise UsageError(
                f"dvc.lock has no entry for {stage}@{profile.name}",
                f"Record it with `dvc commit {stage}@{profile.name}`.",
            )
        folder = paths.ROOT / record.path
        with registry.service(self._tracker.uri):
            self._client.log_inputs(self.run_id, [dataset_input(record, "output")])
            self._tag(dvc_digest=record.digest, path=record.path)
            self._log_finals(records.numbers(records.summary(folder)), 0, None)
            if (folder / "summary.json").is_file():
                self._client.log_artifact(self.run_id, str(folder / "summary.json"))

    def _log_finals(self, found: Mapping[str, float | None], step: int, model_id: str | None) -> None:
        """Log values once, at the last step; tags name what is not finite and what is too much. None is no value."""
        from mlflow.entities import Metric

        values = {name: value for name, value in found.items() if value is not None}
        now = int(time.time() * 1000)
        not_finite = list(self._follower.not_finite) if self._follower else []
        not_finite += [name for name, value in values.items() if not math.isfinite(value)]
        metrics = [
            Metric(name, value, now, step, model_id=model_id)
            for raw, value in values.items()
            if math.isfinite(value) and (name := self._keys.name(raw, MAX_KEYS)) is not None
        ]
        self._client.log_batch(self.run_id, metrics=metrics)
        if not_finite:
            self._tag(not_finite=f"{len(not_finite)} values: {', '.join(not_finite[:20])}")
        if self._keys.left_out:
            left = sorted(self._keys.left_out)
            note = f"{len(left)} keys too many for MLflow's pages, kept in the run's files: {', '.join(left)}"
            self._tag(metrics_left_out=note)

    def _register(self, result: StageResult, maker: Any | None) -> Any:
        """A model version of the result's checkpoint; `maker` is the MLflow run that did the work, if there is one."""
        request = result.request
        name = registry.model_name(self._profile.name)
        tags = {
            "profile": self._profile.name,
            "stage": result.stage,
            "fingerprint": result.fingerprint,
            "path": records.relative(request.output),
            "checkpoint": result.checkpoint or "",
            "git_commit": maker.data.tags["git_commit"] if maker else "",
            "run_id": maker.info.run_id if maker else self.run_id,
        }
        tags |= {f"dvc.{data}": digest for data, digest in request.data_digests.items()}
        tags |= origin_tags(request)
        if request.parent:
            parent_fingerprint = self._tracker.parent_fingerprint(request.parent)
            parent = registry.find_version(self._client, name, parent_fingerprint) if parent_fingerprint else None
            tags |= {
                "upstream_fingerprint": parent_fingerprint or "missing",
                "upstream_stage": request.parent_stage or "",
            }
            tags["upstream_version"] = parent.version if parent else "missing"
        filled = {key: value for key, value in tags.items() if value}
        return registry.register(self._client, maker or self._run, result, filled)

    def _point_alias(self, version: Any) -> None:
        self._client.set_registered_model_alias(version.name, self._stage, version.version)
        self._tag(model=f"{version.name}@{self._stage}", model_version=version.version)

    def _tag(self, **tags: str) -> None:
        self._tracker.tag(self.run_id, {key: value for key, value in tags.items() if value})


def origin_tags(request: StageRequest) -> dict[str, str]:
    """Tags that name the base model a stage starts from, if it does."""
    if request.origin is None:
        return {}
    return {"init_from_folder": request.origin.folder, "init_from_digest": request.origin.digest}
