"""Jobs and limits that the tests of the sandbox share."""

from __future__ import annotations

from typing import Any

from infra.sandbox import Job, Limits

#: Small enough that every limit is met within a second, large enough for pytest.
SMALL = Limits(memory_mb=128, pids=32, file_mb=4, work_mb=16, output_kb=64, seconds=60.0)


def python(code: str, **rest: Any) -> Job:
    """A job that runs `code`; `rest` are other fields of the job."""
    rest.setdefault("limits", SMALL)
    return Job({"job.py": code, **rest.pop("files", {})}, ["python3", "job.py"], **rest)
