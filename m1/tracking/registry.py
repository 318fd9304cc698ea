"""Checkpoints in the model registry: a version per finished checkpoint, an alias per stage; weights stay in place."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from m1.errors import ServiceError
from m1.run.contract import StageResult
from m1.tracking.metrics import first_line


def model_name(profile_name: str) -> str:
    """Registered model and experiment of a profile."""
    return f"m1-{profile_name}"


@contextlib.contextmanager
def service(uri: str) -> Iterator[None]:
    """Turn a failed call to MLflow into the project's one-line error."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        raise ServiceError(
            f"MLflow at {uri} failed: {first_line(error)}",
            "Look at `m1 status`, start the server with `m1 up`, and rerun: finished stages are kept.",
        ) from error


def exists_already(error: Exception) -> bool:
    return getattr(error, "error_code", "") == "RESOURCE_ALREADY_EXISTS"


def is_missing(error: Exception) -> bool:
    return getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


def find_version(client: Any, name: str, fingerprint: str) -> Any | None:
    """Newest version of `name` made from the run with this fingerprint, or None."""
    found = client.search_model_versions(f"name = '{name}' and tags.fingerprint = '{fingerprint}'")
    return max(found, key=lambda version: int(version.version), default=None)


def model_id(version: Any) -> str:
    """Id of the LoggedModel behind a version; a version that is read back names it in its source only."""
    return str(version.source).removeprefix("models:/")


def register(client: Any, run: Any, result: StageResult, tags: dict[str, str]) -> Any:
    """Make a model version of a result's checkpoint.

    The entity behind it is a LoggedModel without files: its tag `path` says where the checkpoint lies.

    Args:
        run: MLflow run that made (or, for a skipped stage, recorded) it.
        tags: of the version and the LoggedModel.

    Returns:
        the ModelVersion.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.exceptions import MlflowException

    name = model_name(tags["profile"])
    try:
        client.create_registered_model(name, description="Checkpoints of every stage; a stage's alias is its newest.")
    except MlflowException as error:
        if not exists_already(error):
            raise
    logged = client.create_logged_model(
        run.info.experiment_id,
        name=re.sub(r"[/:.%\"']", "-", f"{name}-{result.stage}-{result.fingerprint[:8]}"),
        source_run_id=run.info.run_id,
        tags=tags,
        model_type="checkpoint",
    )
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return client.create_model_version(
        name,
        source=f"models:/{logged.model_id}",
        run_id=run.info.run_id,
        tags=tags,
        description=f"{result.stage}: {result.key_metric} {_number(result.before)} -> {_number(result.after)}",
        model_id=logged.model_id,
        await_creation_for=0,  # there are no files to wait for
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
