"""A connection to one MLflow server, and what is asked of it in several places."""

from __future__ import annotations

import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from m1.errors import M1Error, ServiceError
from m1.run.contract import load_result
from m1.tracking import pages, registry
from m1.tracking.limits import KEY_LENGTH, PARAMETER_LENGTH, TAG_LENGTH, cut, cut_note

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

CONNECT_SECONDS = 5.0
NOTE = "mlflow.note.content"
#: Where all of a description is that was cut.
NOTE_FILE = "description.md"
_PARAMETERS_PER_REQUEST = 100
#: Without a proxy: the server is on the loopback interface, or named by its own address.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """Connection to one MLflow server. Make one with `connect`."""

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self.uri = uri
        self.client: MlflowClient = MlflowClient(tracking_uri=uri, registry_uri=uri)

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

    def url(self, run: Run) -> str:
        """Page of a run in the MLflow UI."""
        return f"{self.uri}/{page_of(run)}"

    def original_run(self, profile_name: str, fingerprint: str, *, apart_from: str = "") -> Run | None:
        """Newest run that did the work of this fingerprint (rather than skipped it), or None.

        One that ended well comes before one that did not: the work of a run whose end MLflow missed may still be done.
        """
        return self._newest_that_did(profile_name, f"tags.fingerprint = '{fingerprint}'", apart_from)

    def maker_of(self, profile_name: str, data_stage: str, digest: str) -> Run | None:
        """Newest run that made the data set with this hash (rather than found it made), or None."""
        return self._newest_that_did(profile_name, f"tags.stage = '{data_stage}' and tags.dvc_digest = '{digest}'", "")

    def _newest_that_did(self, profile_name: str, wanted: str, apart_from: str) -> Run | None:
        experiment = self.client.get_experiment_by_name(registry.model_name(profile_name))
        if experiment is None:
            return None
        found = None
        for run in self.runs(experiment.experiment_id, wanted):
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
        """Set several tags at once, cut to MLflow's length; empty ones are left out."""
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in fitting(tags).items()])

    def note(self, run_id: str, text: str) -> None:
        """Set the description of a run; what MLflow does not take of it is kept as a file of the run."""
        self.tag(run_id, {NOTE: cut_note(text, TAG_LENGTH, f"the artifact `{NOTE_FILE}`")})
        if len(text) > TAG_LENGTH:
            self.client.log_text(run_id, text, NOTE_FILE)

    def parameters(self, run_id: str, values: Mapping[str, str]) -> None:
        """Log parameters, cut to MLflow's lengths."""
        from mlflow.entities import Param

        parameters = [Param(key[:KEY_LENGTH], cut(text, PARAMETER_LENGTH)) for key, text in values.items()]
        for start in range(0, len(parameters), _PARAMETERS_PER_REQUEST):
            self.client.log_batch(run_id, params=parameters[start : start + _PARAMETERS_PER_REQUEST])

    def log_file(self, run_id: str, name: str, content: bytes, folder: str | None = None) -> None:
        """Keep bytes as a file of a run."""
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / name
            file.write_bytes(content)
            self.client.log_artifact(run_id, str(file), folder)

    def runs(self, experiment: str, wanted: str, view: int = 1) -> Iterator[Run]:
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

    def nested(self, flow: Run) -> list[Run]:
        """Runs of a flow run's stages, the first first."""
        wanted = f"tags.`mlflow.parentRunId` = '{flow.info.run_id}'"
        return list(self.runs(flow.info.experiment_id, wanted))[::-1]


def page_of(run: Run) -> str:
    """Page of a run, relative to the server's root."""
    return pages.run_page(run.info.experiment_id, run.info.run_id)


def fitting(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags of a run as MLflow takes them. It refuses some empty values; an absent tag says the same."""
    return {key: cut(value, TAG_LENGTH) for key, value in tags.items() if value}
