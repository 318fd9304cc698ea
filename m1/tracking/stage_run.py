"""The MLflow run of one stage: opened by `Tracker.start_stage`, closed by one of finish, finish_data, skip or fail."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from m1 import paths
from m1.config.profile import Profile
from m1.errors import UsageError
from m1.run import folder as run_folder
from m1.run.contract import StageRequest, StageResult
from m1.tracking import flow_run, glossary, kept, records, registry, stage_page
from m1.tracking.markdown import Picture
from m1.tracking.metrics import MAX_KEYS, Follower, MetricKeys
from m1.tracking.server import Server

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

#: So many figures are shown in the description; the others are among the run's files.
_SHOWN_FIGURES = 3


class StageTracker:
    """One stage's run.

    Attributes:
        run_id: MLflow run id.
        url: page of the run in the MLflow UI.
    """

    def __init__(self, tracker: Server, run: Run, profile: Profile, stage: str, request: StageRequest | None) -> None:
        self._tracker, self._client, self._run = tracker, tracker.client, run
        self._profile, self._stage, self._request = profile, stage, request
        self.run_id: str = run.info.run_id
        self.url = tracker.url(run)
        self._keys = MetricKeys(set(run.data.metrics))
        self._follower: Follower | None = None

    def describe(self) -> None:
        """Write the description of a run that has begun."""
        with registry.service(self._tracker.uri):
            self._describe("runs")

    def follow(self) -> None:
        """Forward the run folder's metrics.jsonl from now on, in the background; a fault shows at `finish`."""
        assert self._request is not None, "a data stage writes no metrics.jsonl"
        file = self._request.run / run_folder.METRICS
        self._follower = Follower(self._client, self.run_id, file, self._keys, set(self._run.data.metrics))
        self._follower.start()

    def finish(self, result: StageResult) -> None:
        """Record a complete stage: metrics, figures, log, and its checkpoint as a model version with the stage's alias.

        Raises:
            ServiceError: MLflow did not take something. The run folder is complete nevertheless; the next flow run
                skips the stage and registers its checkpoint then.
        """
        assert self._request is not None
        folder = self._request.run
        last_step = 0
        if self._follower is not None:
            self._follower.stop()
            last_step = self._follower.last_step
        with registry.service(self._tracker.uri):
            for name in (run_folder.RESULT, run_folder.LOG):
                if (folder / name).is_file():
                    self._client.log_artifact(self.run_id, str(folder / name))
            pictures = self._keep_figures(result)
            version = self._register(result, self._run) if result.checkpoint else None
            finals = {"seconds": result.seconds, "key/before": result.before, "key/after": result.after}
            # Where there are too many names, what repeats a curve is left out first.
            ordered = sorted(result.metrics, key=self._keys.__contains__)
            finals |= {f"final/{name}": result.metrics[name] for name in ordered}
            self._log_finals(finals, last_step, registry.model_id(version) if version else None)
            self._tag(
                state="ran",
                key_metric=result.key_metric,
                notes="\n".join(result.notes),
                left_out="\n".join(result.left_out),
            )
            if version is not None:
                self._point_alias(version)
            left_out = {f"final/{name}": result.metrics[name] for name in result.metrics}
            self._explain({name: value for name, value in left_out.items() if name in self._keys.left_out})
            self._describe("ran", result=result, version=version, pictures=pictures)
            self._end("FINISHED")

    def finish_data(self, stage: str, profile: Profile) -> None:
        """Record a complete data stage, after DVC has recorded its output.

        Raises:
            UsageError: dvc.lock has no entry for it.
        """
        seconds = time.time() - self._run.info.start_time / 1000
        with registry.service(self._tracker.uri):  # before the summary, which may be long
            self._log_finals({"seconds": seconds}, 0, None)
        record = self._record_data(stage, profile)
        with registry.service(self._tracker.uri):
            self._tag(state="ran")
            self._explain({})
            self._describe("ran", seconds=seconds, record=record)
            self._end("FINISHED")

    def skip(self, result: StageResult | None, reason: str) -> None:
        """Record that the stage's work was already done.

        Args:
            result: what the stage left earlier; its version gets the stage's alias again. None for a data stage.
            reason: one line for the reader of the run.
        """
        original, version, record = None, None, None
        with registry.service(self._tracker.uri):
            self._tag(state="up to date", skipped="true", skip_reason=reason)
        if result is None:
            record = self._record_data(self._stage, self._profile)
            with registry.service(self._tracker.uri):
                original = self._tracker.maker_of(self._profile.name, self._stage, record.digest)
        else:
            with registry.service(self._tracker.uri):
                original = self._tracker.original_run(self._profile.name, result.fingerprint, apart_from=self.run_id)
                self._tag(key_metric=result.key_metric, left_out="\n".join(result.left_out))
                self._log_finals({"key/before": result.before, "key/after": result.after}, 0, None)
                if result.checkpoint:
                    name = registry.model_name(self._profile.name)
                    # No version: the server died as the stage ended, and the run that did the work is known; or the
                    # stage ran outside a flow, and nobody noted the commit.
                    version = registry.find_version(self._client, name, result.fingerprint)
                    version = version or self._register(result, original)
                    self._point_alias(version)
        with registry.service(self._tracker.uri):
            if original is not None:
                self._tag(original_run=original.info.run_id, original_url=self._tracker.url(original))
            self._explain({})
            self._describe("skipped", reason, result=result, version=version, record=record, original=original)
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
                self._tag(state="stopped" if killed else "failed", error=message)
                if self._request is not None and (log := self._request.run / run_folder.LOG).is_file():
                    self._client.log_artifact(self.run_id, str(log))
                self._explain({})
                seconds = time.time() - self._run.info.start_time / 1000
                self._describe("killed" if killed else "failed", message, seconds=seconds)
                self._end("KILLED" if killed else "FAILED")
        except Exception as error:
            logger.warning("%s", error)

    def _end(self, status: str) -> None:
        """Close the run, and let its flow run tell of it."""
        self._client.set_terminated(self.run_id, status)
        flow_run.refresh(self._tracker, self._run.data.tags["mlflow.parentRunId"])

    def _describe(
        self,
        state: str,
        reason: str = "",
        *,
        seconds: float | None = None,
        result: StageResult | None = None,
        version: ModelVersion | None = None,
        record: records.DataRecord | None = None,
        original: Run | None = None,
        pictures: tuple[Picture, ...] = (),
    ) -> None:
        about = stage_page.Subject(self._tracker, self._run, self._profile, self._stage, self._request)
        ended = stage_page.Ended(state, reason, seconds, result, version, record, original, pictures)
        self._tracker.note(self.run_id, stage_page.note(about, ended, self._keys.names))

    def _keep_figures(self, result: StageResult) -> tuple[Picture, ...]:
        """Keep the figures with the run; the first ones are shown in its description."""
        pictures: list[Picture] = []
        for figure in result.figures:
            file = result.request.run / figure
            if not file.is_file():
                continue
            if len(pictures) < _SHOWN_FIGURES:
                title = file.stem.replace("_", " ")
                pictures += kept.keep_figure(self._tracker, self._run, file, file.name, title)
            else:
                self._client.log_artifact(self.run_id, str(file), kept.FIGURES)
        return tuple(pictures)

    def _record_data(self, stage: str, profile: Profile) -> records.DataRecord:
        from m1.tracking.datasets import dataset_input

        record = records.locked(stage, profile.name)
        if record is None:
            raise UsageError(
                f"dvc.lock has no entry for {stage}@{profile.name}",
                f"Record it with `dvc commit {stage}@{profile.name}`.",
            )
        folder = paths.ROOT / record.path
        summary = records.summary(folder)
        found = records.numbers({key: value for key, value in summary.items() if key != "sources"}, "data/")
        with registry.service(self._tracker.uri):
            self._client.log_inputs(self.run_id, [dataset_input(record, "output")])
            left_out = records.left_out(profile.name, stage)
            self._tag(dvc_digest=record.digest, path=record.path, left_out="\n".join(left_out))
            # Totals first: where there are too many names, what is left out is the finest division.
            self._log_finals(dict(sorted(found.items(), key=lambda item: item[0].count("/"))), 0, None)
            if (folder / "summary.json").is_file():
                self._client.log_artifact(self.run_id, str(folder / "summary.json"))
        return record

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

    def _explain(self, left_out: Mapping[str, float]) -> None:
        """Keep the page that explains the run's metrics with it."""
        values = self._client.get_run(self.run_id).data.metrics
        if values:
            self._client.log_text(self.run_id, glossary.table(values, left_out), kept.METRICS_FILE)

    def _register(self, result: StageResult, maker: Run | None) -> ModelVersion:
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
            tags["upstream_version"] = str(parent.version) if parent else "missing"
        filled = {key: value for key, value in tags.items() if value}
        return registry.register(self._client, maker or self._run, result, filled)

    def _point_alias(self, version: ModelVersion) -> None:
        self._client.set_registered_model_alias(version.name, self._stage, str(version.version))
        self._tag(model=f"{version.name}@{self._stage}", model_version=str(version.version))

    def _tag(self, **tags: str) -> None:
        self._tracker.tag(self.run_id, tags)


def origin_tags(request: StageRequest) -> dict[str, str]:
    """Tags that name the base model a stage starts from, if it does."""
    if request.origin is None:
        return {}
    return {"init_from_folder": request.origin.folder, "init_from_digest": request.origin.digest}
