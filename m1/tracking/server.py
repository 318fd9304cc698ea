"""A connection to one MLflow server, and what is asked of it in several places."""

from __future__ import annotations

import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from m1.errors import M1Error, ServiceError
from m1.run.contract import load_result
from m1.tracking import pages, registry
from m1.tracking.limits import KEY_LENGTH, PARAMETER_LENGTH, TAG_LENGTH, cut, cut_note

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

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
        self._experiments: dict[str, str] = {}
        self._makers: dict[tuple[str, str], Run] = {}

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

    def experiment_id(self, profile_name: str) -> str | None:
        """The profile's experiment, None before its first flow run."""
        if profile_name not in self._experiments:
            found = self.client.get_experiment_by_name(registry.model_name(profile_name))
            if found is None:
                return None
            self._experiments[profile_name] = found.experiment_id
        return self._experiments[profile_name]

    def original_run(self, profile_name: str, fingerprint: str, *, apart_from: str = "") -> Run | None:
        """Newest run that did the work of this fingerprint (rather than skipped it), or None.

        One that ended well comes before one that did not: the work of a run whose end MLflow missed may still be done.
        """
        return self._newest_that_did(profile_name, f"tags.fingerprint = '{fingerprint}'", apart_from)

    def maker_of(self, profile_name: str, data_stage: str, digest: str) -> Run | None:
        """Newest run that made the data set with this hash (rather than found it made), or None."""
        if (data_stage, digest) not in self._makers:
            wanted = f"tags.stage = '{data_stage}' and tags.dvc_digest = '{digest}'"
            found = self._newest_that_did(profile_name, wanted, "")
            if found is None:
                return None
            self._makers[data_stage, digest] = found
        return self._makers[data_stage, digest]

    def _newest_that_did(self, profile_name: str, wanted: str, apart_from: str) -> Run | None:
        experiment = self.experiment_id(profile_name)
        if experiment is None:
            return None
        found = None
        for run in self.runs(experiment, wanted):
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

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Metric] = (),
        parameters: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        note: str = "",
    ) -> None:
        """Send what belongs to a run, in one request if MLflow takes it in one; texts are cut to its lengths.

        Args:
            note: the run's description; what MLflow does not take of it is kept as a file of the run.
        """
        from mlflow.entities import Param, RunTag

        sent = fitting(tags or {})
        if note:
            sent[NOTE] = cut_note(note, TAG_LENGTH, f"the artifact `{NOTE_FILE}`")
        params = [Param(key[:KEY_LENGTH], cut(text, PARAMETER_LENGTH)) for key, text in (parameters or {}).items()]
        self.client.log_batch(
            run_id,
            metrics=metrics,
            params=params[:_PARAMETERS_PER_REQUEST],
            tags=[RunTag(key, value) for key, value in sent.items()],
        )
        for start in range(_PARAMETERS_PER_REQUEST, len(params), _PARAMETERS_PER_REQUEST):
            self.client.log_batch(run_id, params=params[start : start + _PARAMETERS_PER_REQUEST])
        if len(note) > TAG_LENGTH:
            self.client.log_text(run_id, note, NOTE_FILE)

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
