"""The sandbox is tested on a real engine. Where there is none its tests are skipped; with CI set they fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sandbox_jobs import SMALL

from infra.sandbox import Sandbox, images
from tests.needed import need_engine


@pytest.fixture(scope="session")
def image() -> str:
    """An environment with pytest, on a copy of the Python that runs these tests."""
    need_engine()
    base = images.build_base("host-python")
    return images.build_environment("python", list(images.DEFAULT_REQUIREMENTS), base)


@pytest.fixture(scope="session")
def sandbox(image: str) -> Iterator[Sandbox]:
    with Sandbox(image, warm=2, limits=SMALL) as made:
        yield made
