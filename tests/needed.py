"""What a test needs of the machine it runs on."""

from __future__ import annotations

import os

import pytest

from infra.sandbox import engine


def need_engine() -> None:
    """Skip the test where no Docker engine answers; with CI set in the environment, fail it."""
    if (missing := engine.missing()) is None:
        return
    if os.environ.get("CI"):
        pytest.fail(str(missing))
    pytest.skip(str(missing))
