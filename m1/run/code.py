"""A hash of code that changes when what the code computes may change, and not when its words do.

Comments, docstrings and what is said to people (the arguments of errors, prints, log lines, progress remarks, and
descriptions of fields) do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from m1 import paths

#: Calls whose arguments are words for people: print(...), log.warning(...), context.progress(...).
_SAYING_FUNCTIONS = {"print"}
_SAYING_METHODS = {"debug", "info", "warning", "error", "exception", "critical", "progress", "warn"}
_SAYING_KEYWORDS = {"description", "help", "epilog", "metavar"}
_C_SOURCES = {".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".cuh"}
#: String and character literals, which stay; comments, which go.
_C_TOKENS = re.compile(rb'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|//[^\n]*|/\*.*?\*/', re.DOTALL)


def digest(files: Iterable[Path]) -> str:
    """Hash over files of the checkout: 64 hex digits. Their paths count, relative to the checkout."""
    total = hashlib.sha256()
    for path in sorted(set(files)):
        total.update(str(path.relative_to(paths.ROOT)).encode() + b"\0" + file_digest(path))
    return total.hexdigest()


def file_digest(path: Path) -> bytes:
    """Hash of what one file says to the program."""
    return _digest(path.read_bytes(), path.suffix)


@functools.lru_cache(maxsize=4096)
def _digest(content: bytes, suffix: str) -> bytes:
    """Several stages share most of their code; a plan would parse it a dozen times."""
    if suffix == ".py":
        content = _python(content)
    elif suffix in (".yaml", ".yml"):
        content = _yaml(content)
    elif suffix in _C_SOURCES:
        content = _c(content)
    return hashlib.sha256(content).digest()


def _python(source: bytes) -> bytes:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source
    return ast.dump(_Wordless().visit(tree)).encode()


class _Wordless(ast.NodeTransformer):
    """Takes out of a syntax tree what is said to people."""

    def _body(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        first = node.body[0] if node.body else None  # type: ignore[attr-defined]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:]  # type: ignore[attr-defined]
        return node

    visit_Module = visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _body

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.exc, ast.Call):
            node.exc.args, node.exc.keywords = [], []
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        if (isinstance(function, ast.Name) and function.id in _SAYING_FUNCTIONS) or (
            isinstance(function, ast.Attribute) and function.attr in _SAYING_METHODS
        ):
            node.args, node.keywords = [], []
        node.keywords = [keyword for keyword in node.keywords if keyword.arg not in _SAYING_KEYWORDS]
        return node


def _yaml(source: bytes) -> bytes:
    try:
        return json.dumps(yaml.safe_load(source), sort_keys=True, default=str).encode()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, TypeError):
        return source


def _c(source: bytes) -> bytes:
    without = _C_TOKENS.sub(lambda match: b" " if match[0].startswith(b"/") else match[0], source)
    return b"\n".join(line for raw in without.split(b"\n") if (line := b" ".join(raw.split())))
