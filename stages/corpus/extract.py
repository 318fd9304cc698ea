"""Text of a file: markup, boilerplate and licence headers removed, one function per format.

reStructuredText is stripped by line rules and not by docutils: the files use the roles and directives of Sphinx and of
each project's own extensions, which docutils does not know, and their bodies (notes, code, formulas) are wanted.
"""

from __future__ import annotations

import ast
import re
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

import yaml

from m1.data.corpus_spec import Format

_CONTROL = {c: None for c in range(32) if chr(c) not in "\n\t"} | {c: None for c in (127, *range(128, 160))}
_CONTROL |= {c: None for c in (0xFEFF, 0x200B, 0x2060, 0x00AD)}  # byte order mark, zero-width characters, soft hyphen


class Unreadable(ValueError):
    """A document cannot be read in its format; the message is the reason for rejecting it, one word."""


def extract(content: bytes, format: Format, boilerplate: Sequence[str] = ()) -> str:
    """Clean text of a file; empty if it holds none.

    Args:
        boilerplate: regular expressions whose matches are removed before anything else (`^` and `$` match at lines).

    Raises:
        Unreadable: the file cannot be read as this format.
    """
    try:
        text = normalise(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Unreadable("not_utf8") from None
    for pattern in boilerplate:
        text = re.sub(pattern, "", text, flags=re.MULTILINE)
    found = squeeze(_FORMATS[format](text))
    try:
        found.encode()  # escapes in code and YAML can spell what UTF-8 cannot hold
    except UnicodeEncodeError:
        raise Unreadable("lone_surrogate") from None
    return found


def normalise(text: str) -> str:
    """Unicode NFC, `\\n` line ends, no control or invisible characters, no trailing blanks."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n")
    text = unicodedata.normalize("NFC", text.translate(_CONTROL))
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def squeeze(text: str) -> str:
    """No blank lines at either end, at most two in a row, one final newline (none if there is no text)."""
    text = re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")
    return text + "\n" if text.strip() else ""


# --- plain text ---

_GUTENBERG_START = re.compile(r"^\*\*\* ?START OF TH.*$|^\*END\*THE SMALL PRINT!.*$", re.MULTILINE)
_GUTENBERG_END = re.compile(r"^(\*\*\* ?END OF TH|End of (The )?Project Gutenberg).*", re.MULTILINE | re.DOTALL)


def plain(text: str) -> str:
    """Plain text without the licence pages that digital libraries put around a book."""
    starts = list(_GUTENBERG_START.finditer(text))
    if starts:
        text = text[starts[-1].end() :]
    return _GUTENBERG_END.sub("", text)


# --- reStructuredText ---

#: Directives whose body is not text for a reader.
_DROPPED = {
    "toctree", "image", "figure", "include", "literalinclude", "index", "meta", "raw", "only", "ifconfig", "contents",
    "automodule", "autoclass", "autofunction", "automethod", "autosummary", "autoattribute", "autodata", "highlight",
    "currentmodule", "module", "default-domain", "plot", "graphviz", "inheritance-diagram", "role", "sectionauthor",
    "moduleauthor", "tabularcolumns", "container", "rubric", "sidebar", "testsetup", "testcleanup", "changelog",
    "seealso", "footbibliography", "bibliography", "minigallery", "card", "grid", "csv-table", "list-table",
}  # fmt: skip
_DIRECTIVE = re.compile(r"^(\s*)\.\. ([\w:+-]+)::\s*(.*)$")
_COMMENT = re.compile(r"^(\s*)\.\.(\s|$)")
_FILE_OPTIONS = re.compile(r"\A\s*(^:[\w-]+:.*\n)+", re.MULTILINE)
_OPTION = re.compile(r"^\s*:[\w -]+:(\s|$)")
_RULE = re.compile(r"^\s*([=\-~^\"'`*+#.:_<>])\1{2,}\s*$")
_TABLE_RULE = re.compile(r"^\s*(=+\s+)+=+\s*$|^\s*\+([-=]+\+)+\s*$")
_ROLE_TITLE = re.compile(r":[\w:.+-]+:`([^`<]+?)\s*<[^`>]*>`")
_ROLE = re.compile(r":([\w:.+-]+):`([^`]+)`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?")
_REFERENCE = re.compile(r"(?<![`\w])`([^`]+)`__?(?!\w)|\b([A-Za-z][\w-]*)_(?=[\s.,;:)]|$)")
_FOOTNOTE = re.compile(r"\s?\[[#*\w-]*\]_(?!\w)")
_LITERAL = re.compile(r"``(.+?)``")


def rst(text: str) -> str:
    """reStructuredText as plain text; code, formulas and notes stay, directives and roles go."""
    text = _FILE_OPTIONS.sub("", text)
    return _inline("\n".join(_block_lines(text.split("\n"))))


def _block_lines(lines: list[str]) -> list[str]:
    """Lines without directive markers, comments, options, targets and heading rules."""
    kept: list[str] = []
    skip_deeper_than: int | None = None  # inside a dropped block: everything indented more than this
    after_marker = False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if skip_deeper_than is not None:
            if not line.strip() or indent > skip_deeper_than:
                continue
            skip_deeper_than = None
        if after_marker and _OPTION.match(line):
            continue
        after_marker = False
        if directive := _DIRECTIVE.match(line):
            name = directive[2].rpartition(":")[2]
            if name in _DROPPED:
                skip_deeper_than = indent
                continue
            after_marker = True
            argument = directive[3] if name not in ("code-block", "code", "sourcecode", "math", "testcode") else ""
            if name == "math" and directive[3]:
                argument = directive[3]
            if argument:
                kept.append(directive[1] + argument)
        elif _COMMENT.match(line):
            skip_deeper_than = indent
        elif not (_RULE.match(line) or _TABLE_RULE.match(line)):
            kept.append(line)
    return kept


def _inline(text: str) -> str:
    text = _ROLE_TITLE.sub(r"\1", text)
    text = _ROLE.sub(_role_text, text)
    text = _LINK.sub(r"\1", text)
    text = _FOOTNOTE.sub("", text)
    text = _LITERAL.sub("\x00\\1\x00", text)
    text = _REFERENCE.sub(lambda match: match[1] or match[2], text)
    text = text.replace("\x00", "`")
    text = re.sub(r"\|(version|release|today)\|", "", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _role_text(match: re.Match[str]) -> str:
    role, content = match[1], match[2]
    if role == "math":
        return f"${content}$"
    return content.rpartition(".")[2] if content.startswith("~") else content.lstrip("!.")


# --- Markdown ---

_BADGE = re.compile(r"\[?!\[[^\]]*\]\([^)]*\)(\]\([^)]*\))?")
_MD_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
_HTML = re.compile(r"<!--.*?-->|</?[a-zA-Z][^<>\n]*>", re.DOTALL)


def markdown(text: str) -> str:
    """Markdown as plain text: no front matter, images, links' targets, HTML tags or heading marks; code stays."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    parts = re.split(r"(^```.*?^```[ ]*$)", text, flags=re.MULTILINE | re.DOTALL)
    for i in range(0, len(parts), 2):  # fenced code is at the odd places
        part = _HTML.sub("", _MD_LINK.sub(r"\1", _BADGE.sub("", parts[i])))
        part = re.sub(r"^#{1,6} +(.*?)#* *$", r"\1", part, flags=re.MULTILINE)
        parts[i] = re.sub(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1", r"\2", part)
    return normalise("".join(parts))


# --- Python ---

_LICENCE_WORDS = re.compile(r"copyright|licen[sc]e|all rights reserved|spdx|warranty", re.IGNORECASE)
_ENCODING = re.compile(r"^#!.*\n|^#.*coding[:=].*\n", re.MULTILINE)


def python(text: str) -> str:
    """Python code without shebang, encoding line and the licence comment at its head."""
    text = _ENCODING.sub("", text[:200]) + text[200:]
    lines = text.lstrip("\n").split("\n")
    head = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    if _LICENCE_WORDS.search("\n".join(lines[:head])):
        lines = lines[head:]
    return "\n".join(lines)


def docstrings(text: str) -> str:
    """Documentation strings of a Python file in the order of the file, each under the name of what it documents.

    Raises:
        Unreadable: the file is not Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about other people's escape sequences
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Unreadable("not_python") from None
    parts = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        documentation = ast.get_docstring(node)
        if documentation and len(documentation) > 80:  # one-liners say little out of their context
            name = getattr(node, "name", "")
            parts.append((getattr(node, "lineno", 0), f"{name}\n\n{documentation}" if name else documentation))
    return rst("\n\n\n".join(part for _, part in sorted(parts)))


# --- conversations ---


class _WithoutAliases(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def conversations(text: str) -> str:
    """A YAML file with `conversations`, each a list of turns: one paragraph per conversation, one line per turn.

    Raises:
        Unreadable: the file has another shape, or aliases, of which a few lines can make any amount of text.
    """
    try:
        content = yaml.load(text, _WithoutAliases)
        turns = [[str(turn).strip() for turn in conversation] for conversation in content["conversations"]]
    except (yaml.YAMLError, TypeError, KeyError, ValueError, RecursionError, OverflowError):
        raise Unreadable("not_conversations") from None
    return "\n\n".join("\n".join(conversation) for conversation in turns)


_FORMATS = {
    "text": plain,
    "rst": rst,
    "markdown": markdown,
    "python": python,
    "docstrings": docstrings,
    "conversations": conversations,
}
