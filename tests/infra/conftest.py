from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.process import ProcessRecord


@pytest.fixture
def stop_later() -> Iterator[list[int]]:
    """Pids to end, with all below them, when the test is over."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        try:
            record = ProcessRecord.of(pid)
        except Exception:
            continue
        record.stop(grace=0.5)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A shell script that starts a grandchild in a session of its own and writes both pids to `pids`."""
    script = tmp_path / "tree.sh"
    script.write_text("setsid sleep 300 &\necho $! $$ > pids.new; mv pids.new pids; wait\n")
    return script
