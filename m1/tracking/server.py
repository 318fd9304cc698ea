"""A connection to one MLflow server, and what is asked of it in several places."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from m1.errors import M1Error, ServiceError
from m1.run.contract import load_result
from m1.tracking import registry

CONNECT_SECONDS = 5.0
TAG_LENGTH = 8000  # MLflow's limit of a run tag's value
#: Without a proxy: the server is on the loopback interface, or named by its own address.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """Connection to one MLflow server. Make one with `connect`."""

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self.uri = uri
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    @classmethod
    def connect(cls, uri: str) -> Self:
        """Check that an MLflow server answers at `uri` (for example "http://127.0.0.1:5000").

        Raises:
            ServiceError: nothing answers within a few seconds, or it is not MLflow.
        """
        uri = uri.rstrip("/")
        # MLflow's own patience (7 tries of up to 120 s) would let a dead server hold up a flow for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        hint = "Start it with `m1 up`; `m1 status` shows what runs where."
        try:
            with _DIRECT.open(f"{uri}/health", timeout=CONNECT_SECONDS) as answer:
                healthy = answer.read(64).strip() == b"OK"
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServiceError(f"no MLflow server answers at {uri} ({reason})", hint) from error
        if not healthy:
            raise ServiceError(f"what answers at {uri} is not an MLflow server", hint)
        return cls(uri)

    def url(self, run: Any) -> str:
        """Page of a run in the MLflow UI."""
        return f"{self.uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"

    def original_run(self, profile_name: str, fingerprint: str, *, apart_from: str = "") -> Any | None:
        """Newest run that did the work of this fingerprint (rather than skipped it), or None.

        One that ended well comes before one that did not: the work of a run whose end MLflow missed may still be done.
        """
        experiment = self.client.get_experiment_by_name(registry.model_name(profile_name))
        if experiment is None:
            return None
        found = None
        for run in self.runs(experiment.experiment_id, f"tags.fingerprint = '{fingerprint}'"):
            if "skipped" in run.data.tags or run.info.run_id == apart_from:
                continue
            if run.info.status == "FINISHED":
                return run
            found = found or run
        return found

    def parent_fingerprint(self, folder: str) -> str | None:
        """Fingerprint of the run folder a request starts from, None if the folder is gone or damaged."""
        try:
            result = load_result(Path(folder))
        except M1Error:
            return None
        return result.fingerprint if result else None

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set several tags at once, cut to MLflow's length."""
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(key, value[:TAG_LENGTH]) for key, value in tags.items()])

    def runs(self, experiment: str, wanted: str, view: int = 1) -> Iterator[Any]:
        """Runs that match a filter, the newest first (view 1: those not deleted)."""
        token = None
        while True:
            page = self.client.search_runs(
                [experiment], wanted, run_view_type=view, order_by=["attributes.start_time DESC"], page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return
