"""Data sets as MLflow inputs: the digest is DVC's, the source says where the folder is and how it was made.

Imports MLflow; import it only where MLflow is in use.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow.data.dataset_source import DatasetSource
from mlflow.data.dataset_source_registry import register_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE, MAX_DATASET_SOURCE_SIZE

from m1 import paths
from m1.tracking.records import DataRecord, git_revision


class DvcSource(DatasetSource):
    """A folder that DVC tracks, with the record of how it was made."""

    def __init__(self, record: DataRecord, git_commit: str) -> None:
        self.record = record
        self.git_commit = git_commit

    @staticmethod
    def _get_source_type() -> str:
        return "dvc"

    def load(self) -> Path:
        """The folder in this checkout. Its present content may be newer: compare the hash in dvc.lock."""
        folder = paths.ROOT / self.record.path
        if not folder.exists():
            raise FileNotFoundError(f"{folder} is not there; `dvc repro {self.record.name}` makes it")
        return folder

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return False  # made from a record only, never guessed from a path

    @classmethod
    def _resolve(cls, raw_source: Any) -> DvcSource:
        raise NotImplementedError("a DVC source is made from its record")

    def to_dict(self) -> dict[str, Any]:
        """Keys of the record, `git_revision`, and `digest` under DVC's own name `md5`."""
        values = asdict(self.record)
        content = {"path": values.pop("path"), "md5": values.pop("digest"), "dvc_stage": values.pop("name")}
        content |= {"git_revision": self.git_commit, **values}
        for bulky in ("params", "sources"):
            if len(json.dumps(content)) > MAX_DATASET_SOURCE_SIZE:
                content[bulky] = type(content[bulky])()
        return content

    @classmethod
    def from_dict(cls, source_dict: dict[str, Any]) -> DvcSource:
        values = dict(source_dict)
        commit = values.pop("git_revision")
        return cls(
            DataRecord(path=values.pop("path"), digest=values.pop("md5"), name=values.pop("dvc_stage"), **values),
            commit,
        )


register_dataset_source(DvcSource)  # type: ignore[arg-type]  # annotated as an instance, used as a class


def dataset_input(record: DataRecord, context: str) -> DatasetInput:
    """The MLflow input of one data set; `context` is "input" or "output"."""
    # A folder's DVC hash has 36 characters, exactly MLflow's limit; a longer one would be refused by the server.
    assert len(record.digest) <= MAX_DATASET_DIGEST_SIZE, record.digest
    source = DvcSource(record, git_revision().commit)
    values = MetaDataset(source, name=record.name, digest=record.digest).to_dict()  # type: ignore[abstract]
    return DatasetInput(Dataset(**values), tags=[InputTag("mlflow.data.context", context)])
