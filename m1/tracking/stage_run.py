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
from m1.tracking.stage_page import Ended

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
        self._not_finite: list[str] = []
        self._ended_at: int | None = None  #: milliseconds since the epoch, where that is not now

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
            found = {"seconds": result.seconds, "key/before": result.before, "key/after": result.after}
            # Where there are too many names, what repeats a curve is left out first.
            ordered = sorted(result.metrics, key=self._keys.__contains__)
            found |= {f"final/{name}": result.metrics[name] for name in ordered}
            finals = self._finals(found)
            tags = {
                "state": "ran",
                "key_metric": result.key_metric,
                "notes": "\n".join(result.notes),
                "left_out": "\n".join(result.left_out),
                **self._point_alias(version),
            }
            ended = Ended("ran", result=result, version=version, pictures=pictures)
            self._close("FINISHED", finals, ended, tags, last_step, registry.model_id(version) if version else None)

    def catch_up(self, result: StageResult) -> None:
        """Record a complete stage whose own flow did not come to it; what MLflow has already stays as it is.

        Raises:
            ServiceError: MLflow did not take something.
        """
        self._ended_at = int(result.finished_at * 1000)
        self.follow()
        self.finish(result)
        if "error" in self._run.data.tags:
            with registry.service(self._tracker.uri):
                self._client.delete_tag(self.run_id, "error")

    def finish_data(self, stage: str, profile: Profile) -> None:
        """Record a complete data stage, after DVC has recorded its output.

        Raises:
            UsageError: dvc.lock has no entry for it.
            ServiceError: MLflow did not take something.
        """
        seconds = time.time() - self._run.info.start_time / 1000
        record = _record(stage, profile)
        with registry.service(self._tracker.uri):
            finals = self._finals({"seconds": seconds, **_numbers(record)})
            tags = {"state": "ran", **self._keep_data(record)}
            self._close("FINISHED", finals, Ended("ran", seconds=seconds, record=record), tags)

    def skip(self, result: StageResult | None, reason: str) -> None:
        """Record that the stage's work was already done.

        Args:
            result: what the stage left earlier; its version gets the stage's alias again. None for a data stage.
            reason: one line for the reader of the run.

        Raises:
            UsageError: dvc.lock has no entry for a data stage.
            ServiceError: MLflow did not take something.
        """
        tags = {"state": "up to date", "skipped": "true", "skip_reason": reason}
        if result is None:
            record = _record(self._stage, self._profile)
            with registry.service(self._tracker.uri):
                original = self._tracker.maker_of(self._profile.name, self._stage, record.digest)
                tags |= self._keep_data(record) | self._original_tags(original)
                finals = self._finals(_numbers(record))
                self._close("FINISHED", finals, Ended("skipped", reason, record=record, original=original), tags)
            return
        with registry.service(self._tracker.uri):
            original = self._tracker.original_run(self._profile.name, result.fingerprint, apart_from=self.run_id)
            tags |= {"key_metric": result.key_metric, "left_out": "\n".join(result.left_out)}
            tags |= self._original_tags(original)
            version = None
            if result.checkpoint:
                name = registry.model_name(self._profile.name)
                # No version: the server died as the stage ended, and the run that did the work is known; or the
                # stage ran outside a flow, and nobody noted the commit.
                version = registry.find_version(self._client, name, result.fingerprint)
                version = version or self._register(result, original)
            tags |= self._point_alias(version)
            finals = self._finals({"key/before": result.before, "key/after": result.after})
            ended = Ended("skipped", reason, result=result, version=version, original=original)
            self._close("FINISHED", finals, ended, tags)

    def fail(self, message: str, *, killed: bool = False) -> None:
        """Close the run as FAILED (or KILLED). Never raises: the stage's own error is what the user must see."""
        try:
            if self._follower is not None:
                self._follower.stop()
        except Exception as error:
            logger.warning("%s", error)
        try:
            with registry.service(self._tracker.uri):
                if self._request is not None and (log := self._request.run / run_folder.LOG).is_file():
                    self._client.log_artifact(self.run_id, str(log))
                seconds = time.time() - self._run.info.start_time / 1000
                ended = Ended("killed" if killed else "failed", message, seconds)
                tags = {"state": "stopped" if killed else "failed", "error": message}
                self._close("KILLED" if killed else "FAILED", {}, ended, tags)
        except Exception as error:
            logger.warning("%s", error)

    def _close(
        self,
        status: str,
        finals: Mapping[str, float],
        ended: Ended,
        tags: Mapping[str, str],
        step: int = 0,
        model_id: str | None = None,
    ) -> None:
        """Send what is left, describe the run and close it; its flow run tells of a stage that did something.

        Args:
            finals: name in MLflow -> value, logged at `step`.
            model_id: of the checkpoint that they are measured on.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step, model_id=model_id) for name, value in finals.items()]
        subject = stage_page.Subject(self._tracker, self._run, self._profile, self._stage, self._request)
        names = {**self._run.data.metrics, **(self._follower.last_values if self._follower else {}), **finals}
        note = stage_page.note(subject, ended, names)
        self._tracker.log(self.run_id, metrics=metrics, tags={**tags, **self._faults()}, note=note)
        if ended.state != "skipped":  # of what is skipped the run that did the work has them
            kept.log_profile(self._tracker, self.run_id, self._profile)
            if names:
                self._client.log_text(self.run_id, glossary.table(names, self._too_many(ended)), kept.METRICS_FILE)
        self._client.set_terminated(self.run_id, status, self._ended_at)
        if ended.state != "skipped":
            flow_run.refresh(self._tracker, self._run.data.tags["mlflow.parentRunId"])

    def _finals(self, found: Mapping[str, float | None]) -> dict[str, float]:
        """Values under their names in MLflow, without what is not finite or too much; None is no value."""
        values = {name: value for name, value in found.items() if value is not None}
        self._not_finite += [name for name, value in values.items() if not math.isfinite(value)]
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        return {name: value for raw, value in finite.items() if (name := self._keys.name(raw, MAX_KEYS)) is not None}

    def _faults(self) -> dict[str, str]:
        """Tags that name what is not finite, and what is too much for MLflow's pages."""
        tags = {}
        if not_finite := [*(self._follower.not_finite if self._follower else []), *self._not_finite]:
            tags["not_finite"] = f"{len(not_finite)} values: {', '.join(not_finite[:20])}"
        if left := sorted(self._keys.left_out):
            what = f"{len(left)} keys too many for MLflow's pages, kept in the run's files"
            tags["metrics_left_out"] = f"{what}: {', '.join(left)}"
        return tags

    def _too_many(self, ended: Ended) -> dict[str, float]:
        """Final values that there was no room for."""
        metrics = ended.result.metrics if ended.result else {}
        return {f"final/{name}": value for name, value in metrics.items() if f"final/{name}" in self._keys.left_out}

    def _original_tags(self, original: Run | None) -> dict[str, str]:
        if original is None:
            return {}
        return {"original_run": original.info.run_id, "original_url": self._tracker.url(original)}

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

    def _keep_data(self, record: records.DataRecord) -> dict[str, str]:
        """Name the data set as the run's output, and keep its summary; returns the tags that say so."""
        from m1.tracking.datasets import dataset_input

        self._client.log_inputs(self.run_id, [dataset_input(record, "output")])
        summary = paths.ROOT / record.path / "summary.json"
        if summary.is_file():
            self._client.log_artifact(self.run_id, str(summary))
        left_out = "\n".join(records.left_out(self._profile.name, self._stage))
        return {"dvc_digest": record.digest, "path": record.path, "left_out": left_out}

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

    def _point_alias(self, version: ModelVersion | None) -> dict[str, str]:
        """Give a version the stage's alias; returns the tags that say so."""
        if version is None:
            return {}
        self._client.set_registered_model_alias(version.name, self._stage, str(version.version))
        return {"model": f"{version.name}@{self._stage}", "model_version": str(version.version)}


def _record(stage: str, profile: Profile) -> records.DataRecord:
    """What DVC recorded of a data stage.

    Raises:
        UsageError: nothing.
    """
    record = records.locked(stage, profile.name)
    if record is None:
        raise UsageError(
            f"dvc.lock has no entry for {stage}@{profile.name}",
            f"Record it with `dvc commit {stage}@{profile.name}`.",
        )
    return record


def _numbers(record: records.DataRecord) -> dict[str, float]:
    """Numbers of a data set, totals first: where there are too many, what is left out is the finest division."""
    summary = records.summary(paths.ROOT / record.path)
    found = records.numbers({key: value for key, value in summary.items() if key != "sources"}, "data/")
    return dict(sorted(found.items(), key=lambda item: item[0].count("/")))


def origin_tags(request: StageRequest) -> dict[str, str]:
    """Tags that name the base model a stage starts from, if it does."""
    if request.origin is None:
        return {}
    return {"init_from_folder": request.origin.folder, "init_from_digest": request.origin.digest}
