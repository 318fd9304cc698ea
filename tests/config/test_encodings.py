"""Text is UTF-8 wherever the program runs: no call leaves the encoding to the locale."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from m1 import paths

PACKAGES = ("m1", "infra", "flows", "stages", "kernels")


def calls_without_encoding(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that read or write text in the encoding of the locale."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(word.arg in ("encoding", None) for word in node.keywords):
            continue
        if _opens_text(node) or _is_path_text(node) or _decodes_output(node):
            yield node


def _opens_text(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Name) and call.func.id == "open":
        mode = call.args[1] if len(call.args) > 1 else _word(call, "mode")
    elif isinstance(call.func, ast.Attribute) and call.func.attr == "open":
        mode = call.args[0] if call.args else _word(call, "mode")
        if _word(call, "fileobj"):
            return False  # tarfile.open
        if call.args and not (isinstance(mode, ast.Constant) and set(str(mode.value)) <= set("rwaxbt+")):
            return False  # tarfile.open(path) and the like
    else:
        return False
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


def _is_path_text(call: ast.Call) -> bool:
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in ("read_text", "write_text"):
        return False
    module = isinstance(call.func.value, ast.Name) and call.func.value.id == "files"  # `m1.files.write_text`
    return not module and len(call.args) < (1 if call.func.attr == "read_text" else 2)


def _decodes_output(call: ast.Call) -> bool:
    return any(
        isinstance(value := _word(call, name), ast.Constant) and value.value is True
        for name in ("text", "universal_newlines")
    )


def _word(call: ast.Call, name: str) -> ast.expr | None:
    return next((word.value for word in call.keywords if word.arg == name), None)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_text_file_has_an_explicit_encoding(package: str) -> None:
    found = [
        f"{file.relative_to(paths.ROOT)}:{call.lineno}"
        for file in sorted((paths.ROOT / package).rglob("*.py"))
        for call in calls_without_encoding(ast.parse(file.read_bytes()))
    ]
    assert not found, 'give encoding="utf-8": ' + ", ".join(found)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("open(p)", True), ("open(p, 'w')", True), ("open(p, mode='a')", True), ("p.open()", True),
        ("p.open('w')", True), ("(a / b).read_text()", True), ("p.write_text(x)", True),
        ("run(c, text=True)", True), ("open(p, 'rb')", False), ("p.open('rb')", False),
        ("open(p, encoding='utf-8')", False), ("p.read_text('utf-8')", False), ("tarfile.open(p)", False),
        ("tarfile.open(fileobj=f, mode='w')", False),
        ("files.write_text(p, x)", False), ("run(c, text=True, encoding='utf-8')", False), ("run(c)", False),
        ("response.set_data(as_text=True)", False),
    ],
)  # fmt: skip
def test_the_check_sees_what_it_should(line: str, fault: bool) -> None:
    assert bool(list(calls_without_encoding(ast.parse(line)))) == fault


def test_text_is_utf8_in_a_latin_1_locale(tmp_path: Path) -> None:
    """What `m1.files` writes does not depend on the locale either."""
    from m1.files import read_lines, write_text

    write_text(tmp_path / "x", "é\u2028≤\n")
    assert (tmp_path / "x").read_bytes() == "é\u2028≤\n".encode()
    assert read_lines(tmp_path / "x") == ["é\u2028≤"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed(encoding: str) -> None:
    script = "from m1.streams import make_readable; make_readable(); print('a ≤ b → é \\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        cwd=paths.ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    expected = {"ascii": "a <= b -> e ?", "latin-1": "a <= b -> é ?", "utf-8": "a ≤ b → é ?"}[encoding]
    assert done.stdout.decode(encoding).strip() == expected


def test_the_plan_is_printed_in_ascii(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "m1", "plan", "--profile", "smoke"],
        capture_output=True,
        cwd=paths.ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and b"pretrain" in done.stdout
