"""The sandbox is tested on a real engine. Where there is none its tests are skipped; with CI set they fail."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from sandbox_jobs import SMALL

from infra.sandbox import Sandbox, engine, images
from m1.errors import ServiceError


@pytest.fixture(scope="session")
def image() -> str:
    """An environment with pytest, on a copy of the Python that runs these tests."""
    try:
        engine.client()
    except ServiceError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    base = images.build_base("host-python")
    return images.build_environment("python", list(images.DEFAULT_REQUIREMENTS), base)


@pytest.fixture(scope="session")
def sandbox(image: str) -> Iterator[Sandbox]:
    with Sandbox(image, warm=2, limits=SMALL) as made:
        yield made
