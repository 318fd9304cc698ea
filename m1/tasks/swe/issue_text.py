"""Issue text from what a user would see: the failing call, the traceback, what the docstring promises.

By template, and rewritten by a model where an endpoint is given. Neither may show the patch: `leak` finds lines of it.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from m1.tasks.swe.patches import parse_diff
from m1.tasks.swe.python_source import FUNCTIONS, NotPython, parse

#: Shorter lines, such as `return None`, say nothing of a patch.
LEAST_LEAK = 12
_SHOWN_LINES, _DOC_LINES, _MESSAGE_LINES = 14, 14, 12


@dataclass(frozen=True)
class Observation:
    """What is seen of a fault through one failing test.

    Attributes:
        snippet: the test's code up to the failing statement, dedented.
        parameters: of a parametrised test, as text.
        exception, message: what was raised.
        frames: (file, line, function) in the source's own code, outermost first.
        called: the function of the source that the failing statement calls, and its docstring.
    """

    snippet: str
    parameters: str
    exception: str
    message: str
    frames: tuple[tuple[str, int, str], ...] = ()
    called: tuple[str, str] = ("", "")
    more: int = field(default=0)


def observe(
    test: str, failure: Mapping[str, Any], tree: Mapping[str, bytes], is_code: Callable[[str], bool], more: int = 0
) -> Observation:
    """Read a failure (as the probe writes it) against the faulty tree. `more`: how many further tests fail."""
    path = test.partition("::")[0]
    frames = [(str(file), int(line), str(name)) for file, line, name in failure["frames"]]
    in_test = [line for file, line, _ in frames if file == path]
    function = _test_function(tree.get(path, b""), test, in_test)
    snippet, statement = _snippet(tree.get(path, b""), function, in_test)
    own = tuple(frame for frame in frames if is_code(frame[0]))
    return Observation(
        snippet=snippet,
        parameters=_clean(failure["parameters"]) if failure["parameters"] not in ("''", "") else "",
        exception=failure["exception"],
        message=_clean(failure["message"]),
        frames=own,
        called=_called(statement, tree, is_code),
        more=more,
    )


def _clean(text: str) -> str:
    """Without addresses and folders of the sandbox, which differ from run to run; few lines."""
    text = re.sub(r"\b0x[0-9a-f]{6,}\b", "0x...", text)
    text = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)
    lines = text.split("\n")
    return "\n".join(lines[:_MESSAGE_LINES] + (["..."] if len(lines) > _MESSAGE_LINES else [])).rstrip()


def _test_function(content: bytes, test: str, lines: list[int]) -> ast.AST | None:
    """The function that the test id names, or else the one that holds the first frame."""
    try:
        tree = parse(content)
    except NotPython:
        return None
    names = [part.partition("[")[0] for part in test.split("::")[1:]]
    node: ast.AST = tree
    for name in names:
        children = {n.name: n for n in ast.iter_child_nodes(node) if isinstance(n, (*FUNCTIONS, ast.ClassDef))}
        if name not in children:
            break
        node = children[name]
    if isinstance(node, FUNCTIONS):
        return node
    holding = [
        n for n in ast.walk(tree) if isinstance(n, FUNCTIONS) and lines and n.lineno <= lines[0] <= (n.end_lineno or 0)
    ]
    return holding[0] if holding else None


def _snippet(content: bytes, function: ast.AST | None, lines: list[int]) -> tuple[str, ast.AST | None]:
    """The function's code up to the statement that failed, and that statement."""
    if not isinstance(function, FUNCTIONS):
        return "", None
    rows = content.decode("utf-8", "replace").split("\n")
    inside = [line for line in lines if function.lineno <= line <= (function.end_lineno or 0)]
    body = [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    if not body:
        return "", None
    failed = next((s for s in body if inside and s.lineno <= inside[-1] <= (s.end_lineno or 0)), body[-1])
    first, last = body[0].lineno, failed.end_lineno or failed.lineno
    if last - first >= _SHOWN_LINES:
        last = min(last, (inside[-1] if inside else failed.lineno) + _SHOWN_LINES // 2)
        first = max(first, last - _SHOWN_LINES + 1)
    smallest = failed
    for node in ast.walk(failed):
        if isinstance(node, ast.stmt) and inside and node.lineno <= inside[-1] <= (node.end_lineno or 0):
            smallest = node
    return textwrap.dedent("\n".join(rows[first - 1 : last])).strip("\n"), smallest


def _called(statement: ast.AST | None, tree: Mapping[str, bytes], is_code: Callable[[str], bool]) -> tuple[str, str]:
    """The first function or class called in a statement that the source defines with a docstring."""
    names = []
    for node in ast.walk(statement) if statement is not None else ():
        if isinstance(node, ast.Call):
            target = node.func
            names.append(target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", ""))
    wanted = [name for name in names if name]
    if not wanted:
        return "", ""
    documented: dict[str, str] = {}
    for path in sorted(tree):
        if not is_code(path) or not any(name.encode() in tree[path] for name in wanted):
            continue
        try:
            module = parse(tree[path])
        except NotPython:
            continue
        for node in ast.walk(module):
            if (
                isinstance(node, (*FUNCTIONS, ast.ClassDef))
                and node.name in wanted
                and (doc := ast.get_docstring(node))
            ):
                documented.setdefault(node.name, doc)
    return next(((name, documented[name]) for name in wanted if name in documented), ("", ""))


# --- the text ---


def render(seen: Observation) -> str:
    """The issue by template: title, code, what happens, what is expected."""
    name = seen.called[0]
    what = f"`{name}`" if name else "This code"
    is_wrong_result = seen.exception in ("AssertionError", "Failed")
    title = f"{what} gives a wrong result" if is_wrong_result else f"{what} raises {seen.exception}"
    parts = [f"# {title}"]
    if seen.snippet:
        parts.append(f"I run this:\n\n```python\n{seen.snippet}\n```")
    if seen.parameters:
        parts.append(f"with {seen.parameters}.")
    frames = [] if is_wrong_result else [f'  File "{file}", line {line}, in {name}' for file, line, name in seen.frames]
    raised = f"{seen.exception}: {seen.message}" if seen.message else seen.exception
    shown = "\n".join([*(["Traceback (most recent call last):"] if frames else []), *frames, raised])
    parts.append(f"It ends with:\n\n```\n{shown}\n```")
    if seen.called[1]:
        lines = seen.called[1].split("\n")
        quoted = "\n".join(f"> {line}".rstrip() for line in lines[:_DOC_LINES])
        parts.append(f"The documentation of `{name}` says:\n\n{quoted}")
    else:
        parts.append("I expect it to run through, as it did in the version before.")
    if seen.more:
        parts.append(f"{seen.more} other {'case goes' if seen.more == 1 else 'cases go'} wrong in the same way.")
    return _readable("\n\n".join(parts) + "\n")


def _readable(text: str) -> str:
    """Halves of surrogate pairs, which messages and docstrings may have and no file in UTF-8 can hold, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def leak(text: str, gold_patch: str) -> str:
    """The first line of the gold patch, added or removed, that the text shows; empty if there is none.

    Blanks and comments do not count. A line also counts when it is shown as a part of another.
    """
    shown = _squeezed(text)
    for change in parse_diff(gold_patch):
        for hunk in change.hunks:
            for line in _only(hunk.new, hunk.old) + _only(hunk.old, hunk.new):
                bare = _squeezed(line.partition("  #")[0])
                if len(bare) >= LEAST_LEAK and bare in shown:
                    return line.strip()
    return ""


def _only(lines: list[str], others: list[str]) -> list[str]:
    known = set(others)
    return [line for line in lines if line not in known]


def _squeezed(text: str) -> str:
    return re.sub(r"[\s>]+", "", text)


def issue(seen: Observation, gold_patch: str, ask: Callable[[str], str] | None = None) -> str | None:
    """The issue text: the model's where it is usable, else the template's; None if even that would show the patch.

    What leaks is left out part by part: first the documentation, then the code.
    """
    plain = None
    for attempt in (seen, _without(seen, called=("", "")), _without(seen, called=("", ""), snippet="")):
        if not leak(render(attempt), gold_patch):
            plain = render(attempt)
            break
    if plain is None or ask is None:
        return plain
    written = _readable(ask(PROMPT.format(report=plain)).strip())
    usable = 40 <= len(written) <= 4 * len(plain) + 400 and not leak(written, gold_patch)
    return written + "\n" if usable else plain


def _without(seen: Observation, **changes: Any) -> Observation:
    return Observation(**{**seen.__dict__, **changes})


PROMPT = """Below is a bug report that was put together by a script. Write it again as a user of the library would: a \
title, a few sentences in plain words, the code that fails, what it printed, what was expected instead. Keep the code \
and the error message exactly as they are. Do not guess the cause, do not name lines of the library and do not propose \
a change.

{report}"""
