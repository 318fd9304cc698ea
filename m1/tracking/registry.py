"""Checkpoints in the model registry: a version per finished checkpoint, an alias per stage; weights stay in place."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from m1.errors import ServiceError
from m1.run.contract import StageResult
from m1.run.registry import stage
from m1.tracking import notes
from m1.tracking.limits import MODEL_DESCRIPTION_LENGTH, cut
from m1.tracking.metrics import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

_ABOUT = (
    "Checkpoints of every stage of the recipe with this profile; a stage's alias is its newest. "
    "The weights stay in their run folders, which the tag `path` names."
)


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


def find_version(client: MlflowClient, name: str, fingerprint: str) -> ModelVersion | None:
    """Newest version of `name` made from the run with this fingerprint, or None."""
    found = client.search_model_versions(f"name = '{name}' and tags.fingerprint = '{fingerprint}'")
    return max(found, key=lambda version: int(version.version), default=None)


def model_id(version: ModelVersion) -> str:
    """Id of the LoggedModel behind a version; a version that is read back names it in its source only."""
    return str(version.source).removeprefix("models:/")


def register(client: MlflowClient, run: Run, result: StageResult, tags: Mapping[str, str]) -> ModelVersion:
    """Make a model version of a result's checkpoint.

    The entity behind it is a LoggedModel without files: its tag `path` says where the checkpoint lies.

    Args:
        run: MLflow run that made (or, for a skipped stage, recorded) it.
        tags: of the version and the LoggedModel.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.exceptions import MlflowException

    name = model_name(tags["profile"])
    try:
        client.create_registered_model(name, description=_ABOUT)
    except MlflowException as error:
        if not exists_already(error):
            raise
    logged = client.create_logged_model(
        run.info.experiment_id,
        name=re.sub(r"[/:.%\"']", "-", f"{name}-{result.stage}-{result.fingerprint[:8]}"),
        source_run_id=run.info.run_id,
        tags=dict(tags),
        model_type="checkpoint",
    )
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return client.create_model_version(
        name,
        source=f"models:/{logged.model_id}",
        run_id=run.info.run_id,
        tags=dict(tags),
        description=cut(notes.version_note(stage(result.stage).about, result, tags["path"]), MODEL_DESCRIPTION_LENGTH),
        model_id=logged.model_id,
        await_creation_for=0,  # there are no files to wait for
    )
