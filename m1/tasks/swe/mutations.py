"""Procedural mutations of Python functions: small faults as people make them, as edits of exact byte ranges.

Every kind is a function from a node to the edits that make one fault each. Only code inside functions is changed, so
that tests can be chosen by the lines they run; annotations, docstrings and the insides of f-strings are left alone.
A mutation that does not parse, or parses to the same tree, is not one (`mutant`).
"""

from __future__ import annotations

import ast
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from m1.tasks.swe.python_source import (
    FUNCTIONS,
    Edit,
    NotPython,
    PythonSource,
    apply_edits,
    element_at,
    elements,
    parse,
)

Edits = tuple[Edit, ...]


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Attributes:
        element: the function it is in.
        lines: first and last line of the right file that it touches, from the start of its statement.
    """

    kind: str
    element: str
    lines: tuple[int, int]
    edits: Edits

    def apply(self, content: bytes) -> bytes:
        return apply_edits(content, self.edits)


_KINDS: dict[str, tuple[tuple[type[ast.AST], ...], Callable[..., Iterator[Edits]]]] = {}


def _kind(
    name: str, *types: type[ast.AST]
) -> Callable[[Callable[..., Iterator[Edits]]], Callable[..., Iterator[Edits]]]:
    def register(function: Callable[..., Iterator[Edits]]) -> Callable[..., Iterator[Edits]]:
        _KINDS[name] = (types, function)
        return function

    return register


def kinds() -> list[str]:
    """Names of all kinds of mutation."""
    return list(_KINDS)


# --- helpers ---

_ATOMIC = (ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript, ast.List, ast.Dict, ast.Set)


def _inside(source: PythonSource, node: ast.expr) -> str:
    """Text of an expression that is safe inside any other."""
    text = source.text(node)
    return text if isinstance(node, _ATOMIC) else f"({text})"


def _replace(source: PythonSource, node: ast.expr | ast.stmt, text: str) -> Edits:
    return (Edit(*source.span(node), text),)


def _operator(source: PythonSource, left: ast.expr, right: ast.expr, old: str, new: str) -> Iterator[Edits]:
    """Replace the operator `old` (one or two words) that stands between two operands."""
    words = old.split()
    found = source.between(source.span(left)[1], source.span(right)[0])
    for at in range(len(found) - len(words) + 1):
        if [token.text for token in found[at : at + len(words)]] == words:
            yield (Edit(found[at].start, found[at + len(words) - 1].end, new),)
            return


def _swap(source: PythonSource, first: ast.expr | ast.stmt, second: ast.expr | ast.stmt) -> Iterator[Edits]:
    safe = (lambda n: _inside(source, n)) if isinstance(first, ast.expr) else source.text
    if ast.dump(first) != ast.dump(second):
        yield (Edit(*source.span(first), safe(second)), Edit(*source.span(second), safe(first)))


def _name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


# --- operators ---

_BOUNDARY: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
}  # fmt: skip
_NEGATED: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.BitXor: ("^", "|"),
}  # fmt: skip


def _compare(source: PythonSource, node: ast.Compare, table: dict[type[ast.cmpop], tuple[str, str]]) -> Iterator[Edits]:
    operands = [node.left, *node.comparators]
    for at, operator in enumerate(node.ops):
        if type(operator) in table:
            yield from _operator(source, operands[at], operands[at + 1], *table[type(operator)])


@_kind("compare-boundary", ast.Compare)
def _compare_boundary(source: PythonSource, node: ast.Compare) -> Iterator[Edits]:
    yield from _compare(source, node, _BOUNDARY)


@_kind("compare-negate", ast.Compare)
def _compare_negate(source: PythonSource, node: ast.Compare) -> Iterator[Edits]:
    yield from _compare(source, node, _NEGATED)


@_kind("arithmetic-operator", ast.BinOp)
def _arithmetic(source: PythonSource, node: ast.BinOp) -> Iterator[Edits]:
    is_formatting = isinstance(node.op, ast.Mod) and isinstance(node.left, (ast.Constant, ast.JoinedStr))
    if type(node.op) in _ARITHMETIC and not is_formatting:
        yield from _operator(source, node.left, node.right, *_ARITHMETIC[type(node.op)])


@_kind("swap-operands", ast.BinOp)
def _swap_operands(source: PythonSource, node: ast.BinOp) -> Iterator[Edits]:
    if isinstance(node.op, (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.Add)):
        yield from _swap(source, node.left, node.right)


@_kind("augmented-assignment", ast.AugAssign)
def _augmented(source: PythonSource, node: ast.AugAssign) -> Iterator[Edits]:
    if type(node.op) in _ARITHMETIC:
        old, new = _ARITHMETIC[type(node.op)]
        yield from _operator(source, node.target, node.value, old + "=", new + "=")
        yield from _operator(source, node.target, node.value, old + "=", "=")


@_kind("unary-minus", ast.UnaryOp)
def _unary_minus(source: PythonSource, node: ast.UnaryOp) -> Iterator[Edits]:
    if isinstance(node.op, ast.USub):
        yield _replace(source, node, _inside(source, node.operand))


# --- conditions ---


@_kind("boolean-operator", ast.BoolOp)
def _boolean_operator(source: PythonSource, node: ast.BoolOp) -> Iterator[Edits]:
    old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
    for left, right in pairwise(node.values):
        yield from _operator(source, left, right, old, new)


@_kind("drop-condition-part", ast.BoolOp)
def _drop_condition_part(source: PythonSource, node: ast.BoolOp) -> Iterator[Edits]:
    neutral = "True" if isinstance(node.op, ast.And) else "False"
    for value in node.values:
        yield _replace(source, value, neutral)


@_kind("negate-condition", ast.If, ast.While, ast.IfExp)
def _negate_condition(source: PythonSource, node: ast.If | ast.While | ast.IfExp) -> Iterator[Edits]:
    yield _replace(source, node.test, f"(not ({source.text(node.test)}))")


@_kind("remove-not", ast.UnaryOp)
def _remove_not(source: PythonSource, node: ast.UnaryOp) -> Iterator[Edits]:
    if isinstance(node.op, ast.Not):
        yield _replace(source, node, _inside(source, node.operand))


@_kind("comprehension-filter", ast.comprehension)
def _comprehension_filter(source: PythonSource, node: ast.comprehension) -> Iterator[Edits]:
    for condition in node.ifs:
        yield _replace(source, condition, "True")


@_kind("swap-ternary", ast.IfExp)
def _swap_ternary(source: PythonSource, node: ast.IfExp) -> Iterator[Edits]:
    yield from _swap(source, node.body, node.orelse)


# --- constants and names ---


@_kind("integer-constant", ast.Constant)
def _integer(source: PythonSource, node: ast.Constant) -> Iterator[Edits]:
    if type(node.value) is int:
        yield _replace(source, node, str(node.value + 1))
        if node.value > 0:
            yield _replace(source, node, str(node.value - 1))


@_kind("boolean-constant", ast.Constant)
def _boolean(source: PythonSource, node: ast.Constant) -> Iterator[Edits]:
    if isinstance(node.value, bool):
        yield _replace(source, node, str(not node.value))


@_kind("string-constant", ast.Constant)
def _string(source: PythonSource, node: ast.Constant) -> Iterator[Edits]:
    if isinstance(node.value, str | bytes) and node.value:
        yield _replace(source, node, repr(type(node.value)()))


_NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "reversed": "list", "set": "list",
    "int": "float", "float": "int", "enumerate": "iter", "isinstance": "issubclass", "abs": "float", "list": "iter",
    "ceil": "floor", "floor": "ceil", "str": "repr", "repr": "str",
}  # fmt: skip
_METHODS = {
    "strip": "lstrip", "lstrip": "rstrip", "rstrip": "lstrip", "startswith": "endswith", "endswith": "startswith",
    "lower": "upper", "upper": "lower", "find": "rfind", "rfind": "find", "split": "rsplit", "rsplit": "split",
    "partition": "rpartition", "rpartition": "partition", "index": "rindex", "ljust": "rjust", "rjust": "ljust",
    "add": "discard", "append": "extend", "extend": "append", "keys": "values", "values": "keys", "items": "keys",
    "union": "intersection", "intersection": "union", "popleft": "pop", "appendleft": "append", "match": "search",
    "search": "match", "isdigit": "isalpha", "title": "capitalize", "update": "difference_update",
}  # fmt: skip


@_kind("builtin-swap", ast.Call)
def _builtin_swap(source: PythonSource, node: ast.Call) -> Iterator[Edits]:
    if isinstance(node.func, ast.Name) and node.func.id in _NAMES:
        yield _replace(source, node.func, _NAMES[node.func.id])


@_kind("method-swap", ast.Call)
def _method_swap(source: PythonSource, node: ast.Call) -> Iterator[Edits]:
    if isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
        end = source.span(node.func)[1]
        yield (Edit(end - len(node.func.attr.encode()), end, _METHODS[node.func.attr]),)


_EXCEPTIONS = {
    "KeyError": "IndexError", "IndexError": "KeyError", "ValueError": "TypeError", "TypeError": "ValueError",
    "AttributeError": "KeyError", "StopIteration": "ValueError", "ImportError": "ValueError", "OSError": "ValueError",
    "UnicodeDecodeError": "KeyError", "OverflowError": "ValueError", "RuntimeError": "ValueError",
    "NotImplementedError": "ValueError", "ZeroDivisionError": "ValueError",
}  # fmt: skip


@_kind("exception-type", ast.ExceptHandler, ast.Raise)
def _exception_type(source: PythonSource, node: ast.ExceptHandler | ast.Raise) -> Iterator[Edits]:
    if isinstance(node, ast.Raise):
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        caught = [raised] if raised is not None else []
    else:
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type] if node.type else []
    for name in caught:
        if isinstance(name, ast.Name) and name.id in _EXCEPTIONS:
            yield _replace(source, name, _EXCEPTIONS[name.id])


# --- calls, subscripts, parameters ---


@_kind("swap-arguments", ast.Call)
def _swap_arguments(source: PythonSource, node: ast.Call) -> Iterator[Edits]:
    for first, second in pairwise(node.args):
        if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
            yield from _swap(source, first, second)


@_kind("drop-keyword", ast.Call)
def _drop_keyword(source: PythonSource, node: ast.Call) -> Iterator[Edits]:
    for keyword in node.keywords:
        if keyword.arg is None:
            continue
        start, end = source.span(keyword)
        after = source.between(end, source.span(node)[1])
        before = source.between(source.span(node.func)[1], start)
        closing = 0
        while closing < len(after) and after[closing].text == ")" and closing + 1 < len(after):
            closing += 1  # parentheses around the keyword's value
        if after[closing].text == ",":
            yield (Edit(start, after[closing].end, ""),)
        elif closing <= 1 and before and before[-1].text == ",":
            yield (Edit(before[-1].start, end, ""),)
        elif closing <= 1 and before and before[-1].text == "(":
            yield (Edit(start, end, ""),)


@_kind("range-bound", ast.Call)
def _range_bound(source: PythonSource, node: ast.Call) -> Iterator[Edits]:
    if _name_of(node.func) == "range" and 1 <= len(node.args) <= 3 and not isinstance(node.args[-1], ast.Starred):
        bound = node.args[0] if len(node.args) == 1 else node.args[1]
        yield _replace(source, bound, f"{_inside(source, bound)} - 1")
        yield _replace(source, bound, f"{_inside(source, bound)} + 1")


@_kind("slice-bound", ast.Slice)
def _slice_bound(source: PythonSource, node: ast.Slice) -> Iterator[Edits]:
    if node.step is not None:
        return
    if node.lower and node.upper:
        yield _replace(source, node, f"{source.text(node.lower)}:")  # type: ignore[arg-type]
        yield _replace(source, node, f":{source.text(node.upper)}")  # type: ignore[arg-type]
    elif node.lower:
        yield _replace(source, node, f":{source.text(node.lower)}")  # type: ignore[arg-type]
    elif node.upper:
        yield _replace(source, node, f"{source.text(node.upper)}:")  # type: ignore[arg-type]


@_kind("subscript-end", ast.Subscript)
def _subscript_end(source: PythonSource, node: ast.Subscript) -> Iterator[Edits]:
    text = source.text(node.slice)
    if text in ("0", "-1"):
        yield _replace(source, node.slice, "-1" if text == "0" else "0")


@_kind("default-argument", *FUNCTIONS)
def _default_argument(source: PythonSource, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Edits]:
    for default in [*node.args.defaults, *node.args.kw_defaults]:
        if not isinstance(default, ast.Constant):
            continue
        if isinstance(default.value, bool):
            yield _replace(source, default, str(not default.value))
        elif default.value is None:
            yield _replace(source, default, "0")
        elif isinstance(default.value, int):
            yield _replace(source, default, str(default.value + 1))
        elif isinstance(default.value, str) and default.value:
            yield _replace(source, default, "''")


# --- statements ---


@_kind("remove-statement", ast.Assign, ast.AugAssign, ast.Expr, ast.Delete, ast.Raise)
def _remove_statement(source: PythonSource, node: ast.stmt) -> Iterator[Edits]:
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.Yield | ast.YieldFrom)):
        yield _replace(source, node, "pass")


@_kind("return-none", ast.Return)
def _return_none(source: PythonSource, node: ast.Return) -> Iterator[Edits]:
    if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
        yield _replace(source, node.value, "None")


@_kind("loop-control", ast.Break, ast.Continue)
def _loop_control(source: PythonSource, node: ast.Break | ast.Continue) -> Iterator[Edits]:
    yield _replace(source, node, "continue" if isinstance(node, ast.Break) else "break")
    yield _replace(source, node, "pass")


@_kind("remove-guard", ast.If)
def _remove_guard(source: PythonSource, node: ast.If) -> Iterator[Edits]:
    leaves = isinstance(node.body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)
    if leaves and not node.orelse and not source.text(node).startswith("elif"):
        yield _replace(source, node, "pass")


def _else_body(source: PythonSource, node: ast.If) -> list[ast.stmt]:
    """Statements of a plain `else`, none for `elif`."""
    is_elif = len(node.orelse) == 1 and source.text(node.orelse[0]).startswith("elif")
    return [] if is_elif else node.orelse


def _block(source: PythonSource, body: Sequence[ast.stmt]) -> tuple[int, int]:
    return source.span(body[0])[0], source.span(body[-1])[1]


@_kind("swap-branches", ast.If)
def _swap_branches(source: PythonSource, node: ast.If) -> Iterator[Edits]:
    other = _else_body(source, node)
    if other and node.body[0].col_offset == other[0].col_offset:
        (start, end), (other_start, other_end) = _block(source, node.body), _block(source, other)
        texts = [source.content[a:b].decode("utf-8") for a, b in ((start, end), (other_start, other_end))]
        yield (Edit(start, end, texts[1]), Edit(other_start, other_end, texts[0]))


@_kind("drop-else", ast.If)
def _drop_else(source: PythonSource, node: ast.If) -> Iterator[Edits]:
    if other := _else_body(source, node):
        yield (Edit(*_block(source, other), "pass"),)


@_kind("swap-statements", ast.If, ast.For, ast.While, ast.With, *FUNCTIONS)
def _swap_statements(source: PythonSource, node: ast.If | ast.FunctionDef) -> Iterator[Edits]:
    movable = (ast.Assign, ast.AugAssign, ast.Expr, ast.Return)
    for first, second in pairwise(node.body):
        is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        if isinstance(first, movable[:3]) and isinstance(second, movable) and not is_text:
            yield from _swap(source, first, second)


# --- all of a file ---


def mutations(source: PythonSource) -> list[Mutation]:
    """Every mutation of a file, in the order of its syntax tree; `mutant` says which of them are real."""
    found = elements(source.tree)
    result: dict[Edits, Mutation] = {}
    for node, statement in _nodes(source.tree):
        for name, (types, function) in _KINDS.items():
            if not isinstance(node, types):
                continue
            for edits in function(source, node):
                edits = tuple(sorted(edits, key=_start))
                first, last = source.line_of(edits[0].start), source.line_of(max(edits[0].start, edits[-1].end - 1))
                if not isinstance(node, FUNCTIONS):
                    first = min(first, statement)
                elif first < node.body[0].lineno:
                    last = node.end_lineno or last  # a default value acts where the function runs
                lines = (first, last)
                result.setdefault(edits, Mutation(name, element_at(found, first), lines, edits))
    return list(result.values())


def mutant(source: PythonSource, mutation: Mutation) -> bytes | None:
    """The mutated file; None if the edits overlap, or it does not parse, or parses to the same tree."""
    try:
        content = mutation.apply(source.content)
        tree = parse(content)
    except (NotPython, ValueError):
        return None
    return None if ast.dump(tree) == ast.dump(source.tree) else content


def _start(edit: Edit) -> int:
    return edit.start


def _nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, int]]:
    """Nodes inside functions, each with the first line of its statement.

    Docstrings, annotations, decorators and f-strings are left out.
    """

    def visit(node: ast.AST, in_function: bool, line: int) -> Iterator[tuple[ast.AST, int]]:
        if isinstance(node, ast.JoinedStr):
            return
        in_function = in_function or isinstance(node, FUNCTIONS)
        if isinstance(node, ast.stmt | ast.excepthandler):
            line = node.lineno
        if in_function:
            yield node, line
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            children = value if isinstance(value, list) else [value]
            for at, child in enumerate(children):
                is_docstring = (
                    name == "body" and at == 0 and isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                )
                if isinstance(child, ast.AST) and not is_docstring:
                    yield from visit(child, in_function, line)

    yield from visit(tree, False, 1)


# --- choice and combination ---


def choose(
    found: Sequence[tuple[str, Mutation]], generator: random.Random, per_element: int
) -> list[tuple[str, Mutation]]:
    """A shuffled choice of (path, mutation): kinds alternate, rare ones first, at most `per_element` of a function."""
    by_kind: dict[str, list[tuple[str, Mutation]]] = defaultdict(list)
    for place in found:
        by_kind[place[1].kind].append(place)
    names = sorted(by_kind, key=lambda name: (len(by_kind[name]), name))
    for name in names:
        generator.shuffle(by_kind[name])
    taken: Counter[tuple[str, str]] = Counter()
    chosen = []
    while any(by_kind.values()):
        for name in names:
            while by_kind[name]:
                path, mutation = by_kind[name].pop()
                if taken[path, mutation.element] < per_element:
                    taken[path, mutation.element] += 1
                    chosen.append((path, mutation))
                    break
    return chosen


def combine(parts: Sequence[Mutation]) -> Mutation | None:
    """One mutation of several that do not overlap by line, None if they do."""
    ordered = sorted(parts, key=lambda part: part.lines)
    if any(a.lines[1] >= b.lines[0] for a, b in pairwise(ordered)):
        return None
    return Mutation(
        "+".join(sorted(part.kind for part in parts)),
        "+".join(dict.fromkeys(part.element for part in ordered)),
        (ordered[0].lines[0], ordered[-1].lines[1]),
        tuple(edit for part in ordered for edit in part.edits),
    )
