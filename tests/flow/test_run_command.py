"""`m1 run` as it watches a flow run: a server that is gone is one line, whenever it goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import prefect.client.orchestration
import pytest

from infra import services
from infra.process import ProcessRecord
from m1.cli import run as running
from m1.errors import ServiceError


def test_a_server_that_dies_between_two_questions_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was healthy a moment ago; its process is gone when the processes are looked at again."""
    asked: list[str] = []

    class Gone:
        def read_flow_run(self, identity: str) -> None:
            asked.append(identity)
            raise httpx.ConnectError("[Errno 111] Connection refused")

    @contextlib.contextmanager
    def get_client(**options: Any) -> Iterator[Gone]:
        yield Gone()

    monkeypatch.setattr(prefect.client.orchestration, "get_client", get_client)
    monkeypatch.setattr(services, "is_healthy", lambda name, timeout: True)
    monkeypatch.setattr(services, "running", lambda name: None if asked else ProcessRecord(1, "boot:1", ["prefect"]))
    with pytest.raises(ServiceError, match="the Prefect server died while the flow run was going on"):
        running._wait(running.Watched("0123", tmp_path, started=0.0))
    assert asked == ["0123"]
