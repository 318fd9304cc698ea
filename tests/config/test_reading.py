"""YAML that people write: what is read, what is refused and in which words, and how a field is overridden."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from m1 import paths
from m1.config import yaml_text
from m1.config.reading import MAX_BYTES, override, parse_value, read_yaml
from m1.errors import UsageError

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(content: str | bytes) -> Path:
        file = tmp_path / "given.yaml"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    return write_file


def refusal(content: str | bytes, write: Write) -> str:
    file = write(content)
    with pytest.raises(UsageError) as caught:
        read_yaml(file)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert caught.value.exit_code == 2
    return message.replace(str(file), "FILE")


# --- what is read ---


SHIPPED = [*sorted(paths.PROFILES.glob("*.yaml")), paths.DATA_SPECS / "swe.yaml", paths.ROOT / "params.yaml"]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_files_have_no_word_of_two_meanings(file: Path) -> None:
    assert read_yaml(file) == yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("12", 12), ("-12", -12), ("+12", 12), ("0", 0), ("-0", 0), ("9" * 40, int("9" * 40)),
        ("1.0", 1.0), ("1e-3", 0.001), ("1E3", 1000.0), ("1.5e3", 1500.0), (".5", 0.5), ("-.5", -0.5), ("5.", 5.0),
        ("0.5", 0.5), ("00.5", 0.5), ("1e+16", 1e16), ("5e-324", 5e-324),
        ("true", True), ("True", True), ("FALSE", False), ("tRUE", "tRUE"),
        ("null", None), ("~", None), ("", None), ("Null", None), ("nULL", "nULL"),
        ("4.13.0", "4.13.0"), ("1e", "1e"), ("e3", "e3"), ("1-2", "1-2"), ("2024", 2024), ("=", "="),
        ("_1", "_1"), ("y", "y"), ("N", "N"), ("nope", "nope"), ("2024-01", "2024-01"), ("a:30", "a:30"), ("<<", "<<"),
        ("'no'", "no"), ('"0123"', "0123"), ("'2024-13-45'", "2024-13-45"), ("'1e-3'", "1e-3"), ('"null"', "null"),
        ('"\\ud83d\\ude00\\u2028"', "😀\u2028"), ("|\n  no\n", "no\n"), (">-\n  1\n  2\n", "1 2"),
    ],
)  # fmt: skip
def test_words(word: str, value: object, write: Write) -> None:
    read = read_yaml(write(f"field: {word}\n"))["field"]
    assert (read, type(read)) == (value, type(value))
    assert parse_value(word, "--set") == value


@pytest.mark.parametrize(
    "text", ["\ufefffield: é\n", "field: é", "field: é\r\nother: 1\r\n", "--- # one\nfield: é\n...\n"]
)
def test_byte_order_marks_line_ends_and_document_markers(text: str, write: Write) -> None:
    assert read_yaml(write(text))["field"] == "é"


def writable_json() -> st.SearchStrategy[dict[str, Any]]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    keys = st.text(max_size=50)  # a key of more than 1024 characters, escaped, is none to YAML
    values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=12)
    return st.dictionaries(keys, values)


def as_json(value: object, **layout: Any) -> str:
    """JSON whose raw characters YAML allows; it allows fewer of them than JSON."""
    text = json.dumps(value, **layout)
    return yaml_text._UNREADABLE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def as_blocks(value: object, indent: int = 0) -> str:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    lines = []
    for key, item in entries:
        head = f"{as_json(key)}:" if isinstance(value, dict) else "-"
        lines.append(f"{' ' * indent}{head} {as_blocks(item, indent + 1)}")
    return "\n" + "\n".join(lines) if lines else as_json(value, ensure_ascii=False)


@settings(max_examples=50, deadline=None)
@given(writable_json(), st.sampled_from([None, 1]), st.booleans())
def test_json_is_read_as_json(value: dict[str, Any], indent: int | None, plain: bool) -> None:
    read = parse_value(as_json(value, indent=indent, ensure_ascii=plain), "json")
    assert json.dumps(read) == json.dumps(value)


@settings(max_examples=50, deadline=None)
@given(writable_json())
def test_indented_yaml_of_quoted_json_values(value: dict[str, Any]) -> None:
    assert json.dumps(parse_value(as_blocks(value), "yaml")) == json.dumps(value)


def test_aliases_and_merges_never_share_an_object(write: Write) -> None:
    content = read_yaml(
        write(
            "first: &rl {windows: [1], cispo: &cispo {is_weight_max: 5.0}, rate: {max: 1}}\n"
            "second: {<<: *rl, windows: [2]}\n"
            "third: {<<: [{rate: 7}, *rl], cispo: *cispo}\n"
            "list: [*cispo, *cispo]\n"
        )
    )
    assert content["second"] == {"windows": [2], "cispo": {"is_weight_max": 5.0}, "rate": {"max": 1}}
    assert content["third"] == {"windows": [1], "cispo": {"is_weight_max": 5.0}, "rate": 7}
    seen: list[int] = []

    def collect(value: object) -> None:
        if isinstance(value, dict | list):
            seen.append(id(value))
            for item in value.values() if isinstance(value, dict) else value:
                collect(item)

    collect(content)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("name", ["tiny", "smoke", "single-gpu", "m1-456b"])
@pytest.mark.parametrize(("changed", "other"), [("rl-40k", "rl-80k"), ("rl-80k", "rl-40k")])
def test_an_override_of_one_stage_leaves_the_other_alone(name: str, changed: str, other: str) -> None:
    content = read_yaml(paths.PROFILES / f"{name}.yaml")
    before = json.dumps(content[other])
    for field in ("cispo.is_weight_max", "rewards.overlong_cache", "repetition.probability", "learning_rate.max"):
        override(content, f"{changed}.{field}", 0.25, name)
    assert json.dumps(content[other]) == before
    assert content[changed]["cispo"] == {"is_weight_max": 0.25}  # type: ignore[index]


# --- what is refused ---


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("0123", "octal"), ("-017", "octal"), ("00", "octal"), ("0o12", "octal"),
        ("0x1F", "hexadecimal"), ("0b101", "binary"),
        ("1_000", "Leave out the underscores"), ("1_0.5", "Leave out the underscores"),
        ("1:30", "base of 60"), ("190:20:30.15", "base of 60"), ("08:30", "base of 60"),
        ("2024-01-05", "date"), ("2024-13-45", "date"), ("2024-1-5", "date"), ("2024-01-05 10:00:00.5 +1", "date"),
        ("2024-01-05T10:00:00Z", "date"),
        ("yes", "true or false"), ("No", "true or false"), ("ON", "true or false"), ("off", "true or false"),
        (".inf", "finite"), ("-.INF", "finite"), (".NaN", "finite"), ("1e999", "too large"), ("9" * 5000, "too large"),
    ],
)  # fmt: skip
def test_words_that_mean_two_things(word: str, words: str, write: Write) -> None:
    message = refusal(f"a: 1\nsection:\n  - field: {word}\n", write)
    assert message.startswith("FILE, line 3: section.0.field: `")
    assert words in message and word[:9] in message
    assert "in quotes" in message
    with pytest.raises(UsageError, match=r"^--set x: `") as caught:
        parse_value(word, "--set x")
    assert words in str(caught.value)
    assert read_yaml(write(f"field: '{word}'")) == {"field": word}


def test_a_plain_count_is_a_field_name(write: Write) -> None:
    assert read_yaml(write("shares: {1: 0.5, 20: 0.5}\n")) == {"shares": {"1": 0.5, "20": 0.5}}


@pytest.mark.parametrize("key", ["-1", "1.5", "null", "~", "", "true", "no", "2024-01-05", "0x1", ".inf"])
def test_field_names_are_text(key: str, write: Write) -> None:
    message = refusal(f"section:\n  ? {key}\n  : 1\n", write)
    assert message == f"FILE, line 2: section: the field name `{key}` is not text. Put it in quotes."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train_steps: 6\nother: 1\ntrain_steps: 600\n", "line 3: train_steps is given twice, in lines 1 and 3"),
        ("a:\n  - b: {licence: MIT,\n      licence: BSD}\n", "line 3: a.0.b: licence is given twice, in lines 2 and 3"),
        ("a: {b: 1, b: 1}\n", "line 1: a: b is given twice, in line 1"),
        ("a: 1\n'a': 2\n", "given twice, in lines 1 and 2"),
        ("a: &a {x: 1, x: 2}\nb: *a\n", "line 1: a: x is given twice"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n", "line 4: b: << is given twice, in lines 3 and 4. Write one: `<<: ["),
        ("<<: 3\n", "line 1: `<<` takes a section or a list of sections"),
        ("<<: [{a: 1}, 3]\n", "line 1: `<<` takes a section or a list of sections"),
        ("[a, b]: 1\n", "a list or a section in place of a field name"),
        ("{a: 1}: 1\n", "a list or a section in place of a field name"),
        ("a: *b\n", "line 1: not valid YAML: found undefined alias 'b'. Write the anchor"),
        ("a: *.py\n", "text that begins with * goes in quotes"),
        ("a: &a\n  b: *a\n", "line 1: a.b: contains itself through an alias"),
        ("a: &a [[*a]]\n", "a.0.0: contains itself through an alias"),
        ("a:\n\tb: 1\n", "line 2: not valid YAML: while scanning for the next token, found character '\\t'"),
        ("a:\n\tb: 1\n", "Indent with spaces, not with tabs."),
        ("a: 1\n---\nb: 2\n", "line 2: not valid YAML: expected a single document"),
        ("model: [\n", "line 2: not valid YAML"),
        ("a:\n- 1\nb: 1\n c: 2\n", "line 4: not valid YAML"),
        ("a: b: c\n", "line 1: not valid YAML: mapping values are not allowed here"),
        ('a: "\\UFFFFFFFF"\n', "line 1: not valid YAML"),
        ("%YAML 1." + "9" * 5000 + "\n--- a\n", "line 1: not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1: the tag 'tag:yaml.org,2002:python/object"),
        ("a: !!int x\n", "line 1: the tag"),
        ("a: !!str 1\n", "text goes in quotes"),
        ("a: ! '12'\n", "line 1: the tag '!'"),
        ("a: !!timestamp x\n", "line 1: the tag"),
        ('a: "\\ud800"\n', "line 1: '\\ud800' has half of a surrogate pair"),
        ("a: 1\nb: \0\n", "line 2: the character U+0000"),
        ("a: \x1b[31m\n", "line 1: the character U+001B"),
        ("a: 1\n# x\u2028b: 2\n", "line 2: the character U+2028 (LINE SEPARATOR)"),
        ("a: x\x85y\n", "line 1: the character U+0085"),
        ("a: " + "[" * 51 + "]" * 51, "line 1: nested more than 50 deep"),
        ("[" * 100_000, "line 1: nested more than 50 deep"),
        ("? " * 100_000, "line 1: nested more than 50 deep"),
        ("a: [" + "1, " * 30_000 + "]\n", "line 1: more than 20000 values"),
        ("", "FILE: expected a mapping, found no content. Write lines of the form `field: value`."),
        ("# only this\n", "found no content"),
        ("- 1\n", "FILE: expected a mapping, found list"),
        ("just text\n", "FILE: expected a mapping, found 'just text'"),
        ("x" * 2000, "FILE: expected a mapping, found 'xxx"),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, words: str, write: Write) -> None:
    message = refusal(text, write)
    assert words in message
    assert message.startswith("FILE")


def test_depth_counts_through_aliases(write: Write) -> None:
    lines = ["a0: &a0 [1]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 60))]
    assert "nested more than 50 deep" in refusal("\n".join(lines), write)


def test_ten_lines_of_aliases_that_would_make_billions_of_values(write: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    assert "more than 20000 values" in refusal("\n".join(lines), write)
    merged = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]}}" for n in range(1, 30))]
    assert "more than 20000 values" in refusal("\n".join(merged), write)


def test_one_long_text_under_many_aliases_is_no_burden() -> None:
    content = parse_value('a: &a "' + "y" * 100_000 + '"\nb: [' + "*a, " * 10_000 + "]", "x")
    assert len({id(text) for text in content["b"]}) == 1  # type: ignore[call-overload, index]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: é\n".encode("utf-16"), "FILE, line 1: not UTF-8; it looks like UTF-16. Save it as UTF-8."),
        ("a: é\n".encode("utf-16-be"), "it looks like UTF-16"),
        ("a: b\n".encode("utf-16-le"), "it looks like UTF-16"),
        ("a: é\n".encode("utf-32"), "it looks like UTF-32"),
        ("a: 1\nb: é\n".encode("latin-1"), "FILE, line 2: not UTF-8 (byte 0xE9); it looks like Latin-1"),
        (b"# " + b"x" * MAX_BYTES, f"FILE: larger than {MAX_BYTES} bytes"),
    ],
)  # fmt: skip
def test_other_encodings_and_sizes(content: bytes, words: str, write: Write) -> None:
    assert words in refusal(content, write)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for path, words in [
        (tmp_path, f"{tmp_path}: not a file but a folder. Name a YAML file."),
        (tmp_path / "missing.yaml", f"no file {tmp_path}/missing.yaml. Check the name."),
        (tmp_path / "pipe.yaml", "not a file but a device or a pipe"),
        (tmp_path / "loop.yaml", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        (tmp_path / "a\0b", "cannot be read: embedded null byte"),
    ]:
        with pytest.raises(UsageError) as caught:
            read_yaml(path)
        assert words in str(caught.value)


def test_a_file_that_may_not_be_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("a: 1")

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(UsageError, match="cannot be read: Permission denied"):
        read_yaml(file)


def test_a_caller_at_the_end_of_the_stack_gets_an_error_of_ours() -> None:
    def dive(levels: int) -> object:
        return dive(levels - 1) if levels else parse_value("[" * 45 + "]" * 45, "x")

    with pytest.raises(UsageError, match="nested too deep"):
        dive(sys.getrecursionlimit() - len(inspect.stack(0)) - 110)


PIECES = [
    "a", "b: ", "- ", "\n", "\n  ", "[", "]", "{", "}", ", ", ": ", "? ", "&a ", "*a", "<<: ", "!!str ", "!x ", "!<",
    "|", ">-\n", "%YAML 1.2\n", "%TAG ! x\n", "---", "...", '"', "'", "\\x", "\\u12", "\\ud800", "\\UFFFFFFFF", " #",
    "\t", "\ufeff", "\u2028", "\0", "\r", "1", "0x", "1e5", ".", "~", "`", "@", "%", "=", "é", "😀", "!%FF ", "null",
    "no", "2024-01-05",
]  # fmt: skip
soup = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.binary() | soup.map(str.encode) | soup.map(lambda text: text.encode("utf-16")))
def test_any_bytes_give_fields_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    try:
        fields = read_yaml(file)
    except UsageError as error:
        assert str(error).count(str(file)) == 1 and "\n" not in str(error)
    else:
        assert json.loads(json.dumps(fields)) == fields


@settings(max_examples=300, deadline=None)
@given(st.text() | soup)
def test_any_text_is_a_value_or_one_line(text: str) -> None:
    try:
        value = parse_value(text, "--set field")
    except UsageError as error:
        assert str(error).startswith("--set field") and "\n" not in str(error)
    else:
        assert json.loads(json.dumps(value)) == value


def test_lines_are_named_where_there_are_several() -> None:
    with pytest.raises(UsageError, match=r"^--set x, line 2: a is given twice"):
        parse_value("a: 1\na: 2", "--set x")
    with pytest.raises(UsageError, match=r"^xxx.*longer than"):
        parse_value("x" * (MAX_BYTES + 1), "x" * 500)


# --- overrides ---


def some_content() -> dict[str, Any]:
    return {"a": {"b": 1}, "none": None, "stages": [{"steps": 1}, {"steps": 2}], "empty": [], "n": 3}


@pytest.mark.parametrize(
    ("dotted", "where"),
    [
        ("a.b", lambda content: content["a"]["b"]),
        ("a.new", lambda content: content["a"]["new"]),
        ("n", lambda content: content["n"]),
        ("new.section.field", lambda content: content["new"]["section"]["field"]),
        ("stages.1.steps", lambda content: content["stages"][1]["steps"]),
        ("stages.0", lambda content: content["stages"][0]),
    ],
)
def test_an_override_sets_one_field(dotted: str, where: Callable[[Any], object]) -> None:
    content, value = some_content(), {"x": [1]}
    override(content, dotted, value, "tiny.yaml")
    assert where(content) == value
    value["x"].append(2)
    assert where(content) == {"x": [1]}


@pytest.mark.parametrize(
    ("dotted", "words"),
    [
        ("n.x", "tiny.yaml: override n.x: n is not a section (value 3). Write section.field=value"),
        ("a.b.c.d", "override a.b.c.d: a.b is not a section (value 1)"),
        ("none.x", "none is not a section (value None)"),
        ("stages.2.steps", "the list stages has no item 2, its items are 0 to 1. Write the number of an item"),
        ("stages.-1.steps", "the list stages has no item -1"),
        ("stages.steps", "the list stages has no item steps"),
        ("stages.00", "no item 00"),
        ("stages.٠", "no item ٠"),
        ("stages." + "9" * 5000, "no item 999"),
        ("empty.0", "the list empty has no item 0, it is empty"),
        ("", "a part of the name is empty"),
        ("a..b", "override 'a..b': a part of the name is empty"),
        (".a", "a part of the name is empty"),
        ("a.", "a part of the name is empty"),
    ],
)
def test_an_override_that_leads_nowhere(dotted: str, words: str) -> None:
    content = some_content()
    with pytest.raises(UsageError) as caught:
        override(content, dotted, 1, "tiny.yaml")
    assert words in str(caught.value)
    assert content == some_content()
