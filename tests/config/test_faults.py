"""How faults of a file's content are worded: one clause each, with the field as it is written in the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    AliasGenerator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    RootModel,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from m1.config.faults import LONGEST, describe, shorten
from m1.errors import UsageError


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Local(Part):
    kind: Literal["local", "folder"]
    name: str = "x"
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _heavy(self) -> Local:
        if self.weight == 13:
            raise ValueError("weight=13 brings bad luck")
        return self


class Hub(Part):
    kind: Literal["hub"]
    revision: str = "x"
    domain: Literal["local", "prose"] = "prose"  # has a word that names another kind

    @field_validator("revision")
    @classmethod
    def _pinned(cls, revision: str) -> str:
        if revision == "main":
            raise ValueError("main may change unnoticed")
        return revision


class Size(Part):
    width: int = Field(1, ge=1)


class Names(RootModel[list[Size]]):
    pass


def _tag(value: Any) -> str:
    return "size" if isinstance(value, dict) and "width" in value else "local"


class Spec(Part):
    model_config = ConfigDict(
        extra="forbid", strict=True, alias_generator=AliasGenerator(alias=lambda name: name.replace("_", "-"))
    )

    the_size: Size = Size()
    maybe: Size | None = None
    sizes: list[Size] = []
    nested: list[list[Size]] = []
    by_name: Mapping[str, Size] = {}
    shares: dict[int, float] = {}
    sources: list[Annotated[Local | Hub, Field(discriminator="kind")]] = []
    source: Local | Hub | None = Field(None, discriminator="kind")
    either: Size | Local | None = None
    several: list[Local | Size] | int = 0
    chosen: Annotated[Annotated[Size, Tag("size")] | Annotated[Local, Tag("local")], Discriminator(_tag)] | None = None
    word: Literal["x", "y"] = "x"
    rooted: Names = Names([])
    pair: tuple[int, Size] = (1, Size())
    renamed: int = Field(1, validation_alias=AliasChoices("new-name", "old-name"))
    anything: object = None


def faults(given: object, **more: object) -> str:
    with pytest.raises(ValidationError) as caught:
        Spec.model_validate(given)
    return describe(caught.value, Spec, **more)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"word": "z"}, "word: Input should be 'x' or 'y' (value 'z')"),
        ({"the-size": {"width": "3"}}, "the-size.width: Input should be a valid integer (value '3')"),
        ({"the-size": {"width": 0}}, "the-size.width: Input should be greater than or equal to 1 (value 0)"),
        ({"the-size": 3}, "the-size: Input should be a section of fields (value 3)"),
        ([], "Input should be a section of fields (value [])"),
        ({"source": {}}, "source.kind: missing; give it a value"),
        ({"source": {"kind": "ftp"}}, "source.kind: Input should be one of 'local', 'folder', 'hub' (value 'ftp')"),
        ({"source": {"kind": "hub", "revision": "main"}}, "source.revision: main may change unnoticed"),
        ({"source": {"kind": "local", "weight": 13.0}}, "source: weight=13 brings bad luck"),
        ({"shares": {"two": 1.0}}, "shares.two: Input should be a valid integer (value 'two')"),
        ({"shares": {2: "x"}}, "shares.2: Input should be a valid number (value 'x')"),
        # unknown fields, at every kind of place
        ({"the_size": {}}, "the_size: unknown field; did you mean the-size? (value {})"),
        ({"the-size": {"with": 1}}, "the-size.with: unknown field; did you mean width? (value 1)"),
        ({"the-size": {"length": 1}}, "the-size.length: unknown field (value 1); known here: width"),
        ({"maybe": {"wdth": 1}}, "maybe.wdth: unknown field; did you mean width? (value 1)"),
        ({"sizes": [{}, {"wdth": 1}]}, "sizes.1.wdth: unknown field; did you mean width? (value 1)"),
        ({"nested": [[], [{"wdth": 1}]]}, "nested.1.0.wdth: unknown field; did you mean width? (value 1)"),
        ({"by-name": {"a": {"wdth": 1}}}, "by-name.a.wdth: unknown field; did you mean width? (value 1)"),
        ({"rooted": [{"wdth": 1}]}, "rooted.0.wdth: unknown field; did you mean width? (value 1)"),
        ({"pair": (1, {"wdth": 1})}, "pair.1.wdth: unknown field; did you mean width? (value 1)"),
        ({"source": {"kind": "folder", "wight": 1}}, "source.wight: unknown field; did you mean weight? (value 1)"),
        ({"sources": [{"kind": "hub", "revisoin": 1}]}, "sources.0.revisoin: unknown field; did you mean revision?"),
        ({"sources": [{"kind": "local", "domian": 1}]}, "unknown field (value 1); known here: kind, name, weight"),
        ({"either": {"wdth": 1}}, "either.wdth: unknown field; did you mean width? (value 1)"),
        ({"several": [{"kind": "local", "wight": 1}]}, "several.0.wight: unknown field; did you mean weight?"),
        ({"chosen": {"width": 1, "wdth": 1}}, "chosen.wdth: unknown field; did you mean width? (value 1)"),
        ({"chosen": {"wight": 1}}, "chosen.kind: missing; give it a value; chosen.wight: unknown field; did"),
        ({"odl-name": 1}, "odl-name: unknown field; did you mean old-name? (value 1)"),
        # names and values that would garble the line
        ({"a\n\x1b[31mb": 1}, r"'a\n\x1b[31mb': unknown field"),
        ({"the-size": {"width": "x\n" * 900}}, r"(value 'x\nx\n"),
    ],
)  # fmt: skip
def test_a_fault_in_words(content: object, words: str) -> None:
    assert words in faults(content)


def test_every_fault_is_named_once() -> None:
    both = faults({"word": "z", "the-size": {"width": 0}})
    assert both.count("word: ") == both.count("the-size.width: ") == both.count("; ") == 1
    many = faults({"sizes": [3] * 1000})
    assert many.count("sizes.") == 20 and many.endswith("; and 980 more")


def test_items_of_lists_are_called_by_their_name_where_the_content_is_given() -> None:
    content = {"sources": [{"kind": "hub"}, {"kind": "local", "name": "notes", "weight": 0.0}]}
    assert faults(content).startswith("sources.1.weight: ")
    assert faults(content, content=content).startswith("sources.notes.weight: ")
    assert faults(content, content="something else").startswith("sources.1.weight: ")


def test_values_are_shortened_and_never_raise() -> None:
    class Sour:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    for value in ("x" * 10**6, ["y" * 100] * 1000, {"k": ["z"] * 1000}, 10**10_000, Sour(), [Sour()], {Sour(): 1}):
        assert 0 < len(shorten(value)) <= LONGEST
    assert shorten("short") == "'short'"
    assert "Sour instance" in faults({"word": Sour()})


class Other(BaseModel):
    field: int


fields = st.sampled_from(
    ["kind", "width", "weight", "revision", "name", "sources", "source", "either", "several", "by-name", "shares"]
)  # fmt: skip
leaves = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["hub", "local", "size", "ftp", "x"]) | st.text()
)
contents = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields | st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*Spec.model_fields, "by-name"]) | st.text(), contents))
def test_no_content_makes_it_raise(content: dict[str, object]) -> None:
    try:
        Spec.model_validate(content)
    except ValidationError as error:
        for words in (describe(error, Spec), describe(error, Spec, content), describe(error, Other, content)):
            message = str(UsageError(words))
            assert message and "\n" not in message
