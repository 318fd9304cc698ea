"""While a stage runs: are the servers there, and how far has the stage come?"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from infra import services
from m1.errors import ServiceError
from m1.run.folder import Progress, read_progress

#: Seconds without an answer after which a server counts as gone when its process is gone, too.
_DEAD_PATIENCE = 5.0
_LOOK_SECONDS = 5.0
_SERVERS = (("prefect", "Prefect"), ("mlflow", "MLflow"))


class Watch:
    """Called about once a second while a stage runs.

    Args:
        run: the stage's run folder, whose progress is shown; None for a data stage.
        begin: called once, when the stage has started and has cleared its run folder if it had to.
    """

    def __init__(self, run: Path | None = None, stage: str = "", begin: Callable[[], None] | None = None) -> None:
        self._run, self._stage, self._begin = run, stage, begin
        self._artifact: UUID | None = None
        self._shown = -1.0
        now = time.monotonic()
        self._next_look = now + _LOOK_SECONDS
        self._last_answer = {name: now for name, _ in _SERVERS}
        self._urls = {
            "prefect": os.environ.get("PREFECT_API_URL", ""),
            # Where MLflow is now; the worker's environment may be older than the server.
            "mlflow": services.mlflow_url() or os.environ.get("MLFLOW_TRACKING_URI", ""),
        }

    def tick(self) -> None:
        """Look, if it is time.

        Raises:
            ServiceError: a server has gone.
        """
        self._started()
        if time.monotonic() < self._next_look:
            return
        for name, title in _SERVERS:
            self._require(name, title)
        if self._run is not None and self._last_answer["prefect"] > self._next_look:
            self._show(read_progress(self._run))
        self._next_look = time.monotonic() + _LOOK_SECONDS

    def done(self) -> None:
        """The stage has ended well."""
        self._started()
        if self._artifact is not None:
            update_progress_artifact(self._artifact, progress=100.0)

    def _started(self) -> None:
        if self._begin is not None:
            begin, self._begin = self._begin, None
            begin()

    def _require(self, name: str, title: str) -> None:
        if not self._urls[name] or services.answers(f"{self._urls[name]}/health", timeout=3):
            self._last_answer[name] = time.monotonic()
            return
        # A server that lives may only be slow: the machine is busy with our own work.
        patience = services.PATIENCE if services.running(name) else _DEAD_PATIENCE
        if time.monotonic() - self._last_answer[name] > patience:
            raise ServiceError(
                f"the {title} server at {self._urls[name]} stopped answering",
                "Run `m1 up` and then the same command again: it continues from the last complete checkpoint.",
            )

    def _show(self, progress: Progress | None) -> None:
        if progress is None or progress.percent == self._shown:
            return
        self._shown = progress.percent
        if self._artifact is None:
            made = create_progress_artifact(progress=self._shown, key=f"progress-{self._stage}")
            self._artifact = made if isinstance(made, UUID) else None
        else:
            update_progress_artifact(self._artifact, progress=self._shown)
