"""A Python file as bytes with its syntax tree: exact byte positions of nodes and tokens, and its elements.

Files are only ever parsed here, never imported.
"""

from __future__ import annotations

import ast
import difflib
import io
import tokenize
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

MODULE = "<module>"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class NotPython(ValueError):
    """The file is not UTF-8 Python that this interpreter can parse."""


@dataclass(frozen=True)
class Edit:
    """Bytes `start` to `end` of a file become `text`."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Element:
    """A function, method or class: qualified name, first line (decorators included) and last line, 1-based."""

    name: str
    first: int
    last: int
    is_class: bool


@dataclass(frozen=True)
class Token:
    """A token and its byte positions."""

    text: str
    start: int
    end: int


def parse(content: bytes) -> ast.Module:
    """The syntax tree.

    Raises:
        NotPython: see the class.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            return ast.parse(content.decode("utf-8"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotPython(f"{type(error).__name__}: {error}") from None


class PythonSource:
    """A parsed file.

    Raises:
        NotPython: see the class; also a byte order mark, another coding, or a lone carriage return, which would put
            the parser's positions and the file's bytes at odds.
    """

    def __init__(self, content: bytes) -> None:
        if content.startswith(b"\xef\xbb\xbf") or b"\r" in content.replace(b"\r\n", b"\n"):
            raise NotPython("a byte order mark or a lone carriage return")
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        except SyntaxError as error:
            raise NotPython(str(error)) from None
        if encoding != "utf-8":
            raise NotPython(f"coding {encoding}")
        self.content = content
        self.tree = parse(content)
        self.line_starts = [0]
        for line in content.split(b"\n")[:-1]:
            self.line_starts.append(self.line_starts[-1] + len(line) + 1)
        self.tokens = list(self._tokenize())
        self._token_starts = [token.start for token in self.tokens]

    def _tokenize(self) -> Iterator[Token]:
        lines = self.content.decode("utf-8").split("\n")
        try:
            for token in tokenize.generate_tokens(io.StringIO(self.content.decode("utf-8")).readline):
                if token.string.strip() and token.start[0] <= len(lines):
                    start, end = (
                        self.line_starts[row - 1] + len(lines[row - 1][:column].encode("utf-8"))
                        for row, column in (token.start, token.end)
                    )
                    yield Token(token.string, start, end)
        except (tokenize.TokenError, IndentationError, IndexError) as error:
            raise NotPython(str(error)) from None

    def span(self, node: ast.expr | ast.stmt | ast.excepthandler | ast.arg | ast.keyword) -> tuple[int, int]:
        """Byte positions of a node; an expression's own parentheses are outside."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return (
            self.line_starts[node.lineno - 1] + node.col_offset,
            self.line_starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def text(self, node: ast.expr | ast.stmt | ast.arg | ast.keyword) -> str:
        start, end = self.span(node)
        return self.content[start:end].decode("utf-8")

    def between(self, start: int, end: int) -> list[Token]:
        """Tokens that lie wholly between two byte positions."""
        at = bisect_right(self._token_starts, start - 1)
        found = []
        while at < len(self.tokens) and self.tokens[at].end <= end:
            found.append(self.tokens[at])
            at += 1
        return found

    def line_of(self, position: int) -> int:
        """1-based line of a byte position."""
        return bisect_right(self.line_starts, position)


def apply_edits(content: bytes, edits: Iterable[Edit]) -> bytes:
    """The file with the edits made; every other byte stays.

    Raises:
        ValueError: two edits overlap.
    """
    result, done = [], 0
    for edit in sorted(edits, key=lambda e: (e.start, e.end)):
        if edit.start < done or edit.end < edit.start:
            raise ValueError("edits overlap")
        result += [content[done : edit.start], edit.text.encode("utf-8")]
        done = edit.end
    return b"".join([*result, content[done:]])


# --- elements ---


def elements(tree: ast.Module) -> list[Element]:
    """Functions, classes and methods; what is nested in a function belongs to the function. Conditional ones count."""
    found: list[Element] = []

    def visit(body: Sequence[ast.AST], prefix: str) -> None:
        for node in body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                name = prefix + node.name
                is_class = isinstance(node, ast.ClassDef)
                found.append(Element(name, first, node.end_lineno or node.lineno, is_class))
                if is_class:
                    visit(node.body, name + ".")
            elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While, ast.excepthandler)):
                visit(list(ast.iter_child_nodes(node)), prefix)

    visit(tree.body, "")
    return found


def element_at(found: Sequence[Element], line: int) -> str:
    """Qualified name of the innermost element that holds a line, `<module>` if there is none."""
    holding = [element for element in found if element.first <= line <= element.last]
    return max(holding, key=lambda e: (e.first, -e.last)).name if holding else MODULE


def changed_elements(old: bytes | None, new: bytes | None) -> set[str]:
    """Elements of the old file that a change touches; an added element counts as what it was added to.

    A file that is not Python, or is wholly new or gone, is one element, `<module>`.
    """
    if old is None or new is None:
        return {MODULE}
    try:
        before, after = elements(parse(old)), elements(parse(new))
    except NotPython:
        return {MODULE}
    names = {element.name for element in before}
    touched = set()
    old_lines, new_lines = old.split(b"\n"), new.split(b"\n")
    for tag, old_first, old_last, new_first, new_last in difflib.SequenceMatcher(
        None, old_lines, new_lines, autojunk=False
    ).get_opcodes():
        if tag == "equal":
            continue
        here = {element_at(before, at + 1) for at in range(old_first, old_last) if old_lines[at].strip()}
        if not here:
            here = {element_at(after, at + 1) for at in range(new_first, new_last) if new_lines[at].strip()}
        for name in here:
            while name not in names and name != MODULE:
                name = name.rpartition(".")[0] or MODULE
            touched.add(name)
    return touched


def changed_locations(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """(file, element) pairs of the old tree that a change touches, in order."""
    return sorted(
        (path, name)
        for path in old.keys() | new.keys()
        if old.get(path) != new.get(path)
        for name in changed_elements(old.get(path), new.get(path))
    )
