"""Small real packages for the tests, from `data_specs/swe.yaml`: parsed and run in the sandbox, never imported."""

from __future__ import annotations

from functools import cache

import pytest

from m1 import paths
from m1.errors import M1Error
from m1.tasks.swe import sources
from m1.tasks.swe.patches import Tree

SMALL = ("inflection", "cachetools", "parse")


@cache
def package(name: str) -> sources.Package:
    spec = sources.load(paths.DATA_SPECS / "swe.yaml")
    return next(p for p in spec.packages if p.name == name)


@cache
def tree(name: str) -> Tree:
    """The package's files; the test is skipped where they can neither be found nor fetched."""
    try:
        return package(name).tree()
    except M1Error as error:
        pytest.skip(f"no source distribution of {name}: {error}")


@cache
def code_files() -> dict[str, bytes]:
    """Code of the small packages, by package and path."""
    return {
        f"{name}/{path}": content
        for name in SMALL
        for path, content in tree(name).items()
        if package(name).is_code(path)
    }
