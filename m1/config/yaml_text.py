"""YAML text to plain values.

PyYAML finds the structure; what a plain word means is decided here, by the core schema of YAML 1.2. Where YAML 1.1,
which PyYAML follows, means something else by the same word (`no`, `0123`, `1:30`, `2024-01-05`), the word is refused:
its writer had one of the two in mind, and nobody can tell which.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

import yaml

from m1.config.faults import LONGEST, name_of, shorten
from m1.errors import UsageError

#: Values and keys of a file, those behind aliases counted as often as they are used.
MAX_VALUES = 20_000
MAX_DEPTH = 50
#: Python refuses to convert integers of more digits.
_MOST_DIGITS = 4300

_COUNT = re.compile("0|[1-9][0-9]{0,17}")
_STR, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_ZONE = r"([ \t]*(Z|[-+][0-9]{1,2}(:?[0-9]{2})?))?)?"
#: Meaning of a plain word, the first that fits; text if none does. A meaning in `_REFUSED` is an error.
_MEANINGS = [
    (meaning, re.compile(pattern))
    for meaning, pattern in (
        ("null", r"|~|null|Null|NULL"),
        ("bool", r"true|True|TRUE|false|False|FALSE"),
        ("octal", r"[-+]?0o?[0-9]+"),
        ("base", r"[-+]?0x[0-9a-fA-F_]+|[-+]?0b[01_]+"),
        ("int", r"[-+]?[0-9]+"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
        ("infinite", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        ("underscores", r"[-+]?\.?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?"),
        ("sixties", r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"),
        ("date", r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(([Tt]|[ \t]+)[0-9]{1,2}:[0-9]{2}:[0-9]{2}(\.[0-9]*)?" + _ZONE),
        ("yes", r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF"),
        (_MERGE, r"<<"),
    )
]
_OR_QUOTES = "or put it in quotes if it is text."
_REFUSED = {
    "octal": ("is octal in one version of YAML only", f"Write it in decimal, without a zero in front, {_OR_QUOTES}"),
    "base": ("is a hexadecimal or binary number", f"Write it in decimal, {_OR_QUOTES}"),
    "infinite": ("is not a finite number", f"Write a finite one, {_OR_QUOTES}"),
    "underscores": ("is a number in YAML 1.1 and text in YAML 1.2", f"Leave out the underscores, {_OR_QUOTES}"),
    "sixties": ("is a number to the base of 60 in YAML 1.1 and text in 1.2", f"Write it in decimal, {_OR_QUOTES}"),
    "date": ("is a date in YAML 1.1 and text in YAML 1.2", "Put it in quotes."),
    "yes": ("is a truth value in YAML 1.1 and text in YAML 1.2", f"Write true or false, {_OR_QUOTES}"),
}
#: Characters that YAML forbids, and those at which YAML 1.1 ends a line but YAML 1.2 and editors do not.
_UNREADABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_HINTS = {
    r"'\t'": "Indent with spaces, not with tabs.",
    "another document": "Keep one document: remove the line `---` and what does not belong.",
    "alias": "Write the anchor, &name, above it; text that begins with * goes in quotes.",
    "": "Correct the line; text with special characters goes in quotes.",
}


def parse(text: str, source: str, with_lines: bool) -> object:
    """The value of a document, None if there is no content; no two parts of it share an object.

    Args:
        text: the document.
        source: names it in errors.
        with_lines: errors name the line, too.

    Raises:
        UsageError: not YAML, more than one document, more or deeper than allowed, a field given twice, or a word that
            the versions of YAML read differently.
    """

    def refuse(line: int, what: str, hint: str) -> UsageError:
        return UsageError(f"{source}, line {line}: {what}" if with_lines else f"{source}: {what}", hint)

    if unreadable := _UNREADABLE.search(text):
        code = ord(unreadable.group())
        name = unicodedata.name(unreadable.group(), "not printable")
        line = len(re.findall(r"\r\n?|\n", text[: unreadable.start()])) + 1
        raise refuse(line, f"the character U+{code:04X} ({name})", "Remove it, or write its code in double quotes.")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _Values().build(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark or loader.get_mark()
        if error.note is not None:
            raise refuse(mark.line + 1, str(error.problem), error.note) from None
        what = "not valid YAML: " + ", ".join(_problem(error, mark))
        hint = next(hint for sign, hint in _HINTS.items() if sign in what)
        raise refuse(mark.line + 1, what, hint) from error
    except (ValueError, OverflowError) as error:  # the scanner's: "\UFFFFFFFF", a directive with a huge number
        raise refuse(loader.line + 1, f"not valid YAML: {error}", _HINTS[""]) from error
    except RecursionError:  # within `MAX_DEPTH` where the caller is at the end of the stack
        raise refuse(loader.line + 1, "nested too deep", "Write fewer levels.") from None
    finally:
        loader.dispose()


def _problem(error: yaml.MarkedYAMLError, mark: yaml.Mark) -> list[str]:
    """PyYAML's words for it; some hold text of the file, of any length."""
    context, begun = str(error.context)[:LONGEST], error.context_mark
    elsewhere = f" (line {begun.line + 1})" if begun is not None and begun.line != mark.line else ""
    return [*([context + elsewhere] if error.context else []), str(error.problem)[:LONGEST]]


def _fault(mark: yaml.Mark | None, what: str, hint: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark, note=hint)


class _Loader(yaml.SafeLoader):
    """Nodes of the one document, as many and as deep as allowed; their tags are what the words mean."""

    values = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self.values += 1
        self.depth += 1
        if (tag := getattr(event, "tag", None)) is not None:
            raise _fault(event.start_mark, f"the tag {shorten(tag)}", "Remove it; text goes in quotes.")
        _check_bounds(event, self.values, self.depth)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        try:  # JSON writes characters above U+FFFF as two codes, "\ud83d\ude00", which PyYAML does not join
            node.value = node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            what = f"{shorten(node.value)} has half of a surrogate pair"
            raise _fault(node.start_mark, what, r"Write the character itself, or \U and eight digits.") from None
        return node

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:  # plain, not quoted
            return next((meaning for meaning, pattern in _MEANINGS if pattern.fullmatch(value)), _STR)
        return super().resolve(kind, value, implicit)


def _check_bounds(at: Any, values: int, depth: int) -> None:
    if values > MAX_VALUES:
        raise _fault(at.start_mark, f"more than {MAX_VALUES} values", "Write less, or use fewer aliases.")
    if depth > MAX_DEPTH:
        raise _fault(at.start_mark, f"nested more than {MAX_DEPTH} deep", "Write fewer levels.")


class _Values:
    """Makes values of nodes, new ones for every alias, so that a change in one place changes no other."""

    def __init__(self) -> None:
        self.values = 0
        self.open: list[yaml.Node] = []  # the collections around what is being made
        self.field: list[str] = []

    def build(self, node: yaml.Node) -> object:
        self.values += 1
        _check_bounds(node, self.values, len(self.open) + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if any(node is other for other in self.open):
            raise self._refuse(node, "contains itself through an alias", "Remove the alias.")
        self.open.append(node)
        made = self._mapping(node) if isinstance(node, yaml.MappingNode) else self._list(node)
        self.open.pop()
        return made

    def _list(self, node: yaml.Node) -> list[object]:
        return [self._within(str(number), item) for number, item in enumerate(node.value)]

    def _within(self, name: str, node: yaml.Node) -> object:
        self.field.append(name)
        value = self.build(node)
        self.field.pop()
        return value

    def _mapping(self, node: yaml.Node) -> dict[str, object]:
        given: dict[str, object] = {}
        merged: dict[str, object] = {}
        lines: dict[tuple[bool, str], int] = {}  # `<<` in quotes is a name like any other
        for key_node, value_node in node.value:
            merges = key_node.tag == _MERGE
            key, line = self._key(key_node), key_node.start_mark.line + 1
            if first := lines.get((merges, key)):
                where = f"line {line}" if first == line else f"lines {first} and {line}"
                hint = "Write one: `<<: [*a, *b]`." if merges else "Remove one of the two."
                raise self._refuse(key_node, f"{name_of(key)} is given twice, in {where}", hint)
            lines[merges, key] = line
            value = self._within(key, value_node)
            if merges:
                merged = self._merged(value_node, value)
            else:
                given[key] = value
        return merged | given

    def _merged(self, node: yaml.Node, value: object) -> dict[str, object]:
        """What `<<` brings in; of several sections, the first that has a key."""
        merged: dict[str, object] = {}
        for part in reversed(value if isinstance(value, list) else [value]):
            if not isinstance(part, dict):
                raise self._refuse(node, "`<<` takes a section or a list of sections", "Write `<<: *name`.")
            merged |= part
        return merged

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._refuse(node, "a list or a section in place of a field name", "Write `field: value`.")
        if node.tag == "int" and _COUNT.fullmatch(node.value):
            return str(node.value)  # `{1: ..., 2: ...}` is what everyone writes, and no two readers differ on it
        if node.tag not in (_STR, _MERGE):
            raise self._refuse(node, f"the field name `{name_of(node.value)}` is not text", "Put it in quotes.")
        return str(node.value)

    def _scalar(self, node: yaml.ScalarNode) -> object:
        word: str = node.value
        if node.tag in _REFUSED:
            why, hint = _REFUSED[node.tag]
            raise self._refuse(node, f"`{name_of(word)}` {why}", hint)
        if node.tag == "null":
            return None
        if node.tag == "bool":
            return word.lower() == "true"
        if node.tag in ("int", "float"):
            number = (int if node.tag == "int" else float)(word) if len(word) <= _MOST_DIGITS else math.inf
            if math.isinf(number):
                raise self._refuse(
                    node, f"`{name_of(word)}` is too large a number", f"Write a smaller one, {_OR_QUOTES}"
                )
            return number
        return word

    def _refuse(self, node: yaml.Node, what: str, hint: str) -> yaml.MarkedYAMLError:
        field = ".".join(name_of(part) for part in self.field)
        return _fault(node.start_mark, f"{field}: {what}" if field else what, hint)
