"""A faulty corpus spec is refused with the field, the value and the way out; the shipped ones are right."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_inputs import local_source

from m1 import paths
from m1.data import corpus_spec as spec
from m1.errors import UsageError


@pytest.mark.parametrize("path", sorted(paths.DATA_SPECS.glob("corpus-*.yaml")), ids=lambda path: path.stem)
def test_shipped_specs_are_valid(path: Path) -> None:
    loaded = spec.load(path.stem, path.parent)
    shares = {source.domain: 0.0 for source in loaded.sources}
    for source in loaded.sources:
        shares[source.domain] += source.weight
    assert sum(shares.values()) == pytest.approx(1.0)
    # MiniMax-M1 report §2.1: STEM, code, books and reasoning are 70% of the mixture.
    assert sum(share for domain, share in shares.items() if domain != "prose") == pytest.approx(0.7)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"wieght": 1}, "sources.notes.wieght: unknown field; did you mean weight?"),
        ({"domain": "poetry"}, "sources.notes.domain: Input should be 'prose', 'stem', 'code', 'books' or 'qa'"),
        ({"weight": 0}, "sources.notes.weight: Input should be greater than 0 (value 0)"),
        ({"kind": "ftp"}, "'ftp'"),
        ({"include": []}, "sources.notes.include: List should have at least 1 item"),
        ({"boilerplate": ["("]}, "is not a regular expression"),
        (
            {"kind": "pypi-sdist", "path": None, "package": "x", "version": "1", "sha256": "abc"},
            "sources.notes.sha256:",
        ),
    ],
)
def test_faulty_source(change: dict[str, object], expected: str, write_spec) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError) as caught:
        spec.load(write_spec([local_source(**change)]), paths.DATA_SPECS)
    assert expected in str(caught.value)
    assert "corpus-test.yaml" in str(caught.value)


def test_hub_data_set_must_be_pinned(write_spec) -> None:  # type: ignore[no-untyped-def]
    source = {"name": "rows", "kind": "hub", "licence": "MIT", "domain": "prose", "weight": 1.0}
    with pytest.raises(UsageError, match=r"sources\.rows: dataset somebody/something needs a revision"):
        spec.load(write_spec([source | {"dataset": "somebody/something"}]), paths.DATA_SPECS)


def test_missing_field_and_double_name(write_spec) -> None:  # type: ignore[no-untyped-def]
    source = local_source()
    del source["licence"]
    with pytest.raises(UsageError, match=r"sources\.notes\.licence: missing"):
        spec.load(write_spec([source]), paths.DATA_SPECS)
    with pytest.raises(UsageError, match="two sources are named notes"):
        spec.load(write_spec([local_source(), local_source()]), paths.DATA_SPECS)


def test_missing_spec_names_those_that_exist(write_spec) -> None:  # type: ignore[no-untyped-def]
    write_spec([local_source()])
    with pytest.raises(UsageError, match=r"corpus-tinny\.yaml.*corpus-test"):
        spec.load("corpus-tinny")


@pytest.mark.parametrize("text, expected", [("a: [", "not valid YAML"), ("- 1", "expected a mapping, found list")])
def test_not_a_spec(text: str, expected: str, checkout: Path) -> None:
    (checkout / "data_specs" / "corpus-test.yaml").write_text(text)
    with pytest.raises(UsageError, match=expected):
        spec.load("corpus-test")
