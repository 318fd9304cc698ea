"""Mutations: each kind does what its name says, at exact positions, on small functions and on whole real packages."""

from __future__ import annotations

import ast
import random
from collections import Counter

import pytest

from m1.tasks.swe.mutations import Mutation, choose, combine, kinds, mutant, mutations
from m1.tasks.swe.python_source import MODULE, NotPython, PythonSource, changed_elements, element_at, elements, parse
from tests.swe.packages import code_files

EXAMPLES = [
    ("compare-boundary", "return a < b", "return a <= b"),
    ("compare-negate", "return a not in b", "return a in b"),
    ("compare-negate", "return a is b", "return a is not b"),
    ("arithmetic-operator", "return (a) // (b)", "return (a) / (b)"),
    ("swap-operands", "return a * 2 - b", "return b - (a * 2)"),
    ("augmented-assignment", "a += b", "a -= b"),
    ("augmented-assignment", "a += b", "a = b"),
    ("unary-minus", "return -a", "return a"),
    ("boolean-operator", "return a and b and c", "return a and b or c"),
    ("drop-condition-part", "return a or b", "return a or False"),
    ("negate-condition", "while a < b: pass", "while (not (a < b)): pass"),
    ("remove-not", "return not (a or b)", "return (a or b)"),
    ("comprehension-filter", "return [x for x in a if x]", "return [x for x in a if True]"),
    ("swap-ternary", "return a if c else b", "return b if c else a"),
    ("integer-constant", "return 7", "return 8"),
    ("integer-constant", "return 7", "return 6"),
    ("boolean-constant", "return True", "return False"),
    ("string-constant", "return 'é' 'x'", "return ''"),
    ("builtin-swap", "return min(a)", "return max(a)"),
    ("method-swap", "return a.é.strip()", "return a.é.lstrip()"),
    ("exception-type", "raise KeyError(a)", "raise IndexError(a)"),
    ("swap-arguments", "return g(a, b + c)", "return g((b + c), a)"),
    ("drop-keyword", "return g(a, key=(b))", "return g(a)"),
    ("drop-keyword", "return g(key=b, *a)", "return g( *a)"),
    ("drop-keyword", "return g(key=((b)))", "return g()"),
    ("range-bound", "return range(a, b)", "return range(a, b - 1)"),
    ("slice-bound", "return a[b:c]", "return a[b:]"),
    ("slice-bound", "return a[b:]", "return a[:b]"),
    ("subscript-end", "return a[0]", "return a[-1]"),
    ("remove-statement", "a = 1; return a", "pass; return a"),
    ("return-none", "return (a)", "return (None)"),
    ("loop-control", "while a: break", "while a: continue"),
    ("remove-guard", "if a: return b", "pass"),
    ("swap-branches", "if a:\n        b\n    else:\n        c", "if a:\n        c\n    else:\n        b"),
    ("drop-else", "if a:\n        b\n    else:\n        c", "if a:\n        b\n    else:\n        pass"),
    ("swap-statements", "a = 1\n    b = 2", "b = 2\n    a = 1"),
]


def in_function(body: str) -> bytes:
    return f"# é before\ndef f(a, b, c):\n    {body}\n".encode()


def mutants_of(content: bytes) -> dict[str, list[bytes]]:
    source = PythonSource(content)
    found: dict[str, list[bytes]] = {}
    for mutation in mutations(source):
        made = mutant(source, mutation)
        if made is not None:
            found.setdefault(mutation.kind, []).append(made)
    return found


@pytest.mark.parametrize(("kind", "before", "after"), EXAMPLES)
def test_every_kind_makes_the_fault_it_is_named_after(kind: str, before: str, after: str) -> None:
    assert in_function(after) in mutants_of(in_function(before)).get(kind, [])


def test_every_kind_has_an_example() -> None:
    shown = {kind for kind, _, _ in EXAMPLES} | {"default-argument"}
    assert shown == set(kinds())
    assert len(kinds()) >= 15
    assert (
        b"def f(a=True, b=4):\n    return a\n" in mutants_of(b"def f(a=True, b=3):\n    return a\n")["default-argument"]
    )


@pytest.mark.parametrize(
    "content",
    [
        b'def f(a):\n    """Not 1 but True."""\n    pass\n',
        b"def f(a: 1 = None) -> 2:\n    ...\n",
        b"def f(a):\n    f'{a + 1} {not a}'\n    pass\n",
        b"X = 1 + 2\nif X < 3:\n    X = min(X, 4)\n",
        b"@cache(1, size=2)\ndef f(a):\n    pass\n",
    ],
)
def test_text_annotations_formatted_strings_and_module_level_are_left_alone(content: bytes) -> None:
    found = mutants_of(content)
    assert set(found) <= {"remove-statement", "default-argument"}


def test_elif_chains_are_not_torn() -> None:
    content = (
        b"def f(a):\n    if a:\n        return 1\n    elif a > 1:\n        return 2\n    else:\n        return 3\n"
    )
    for group in mutants_of(content).values():
        for made in group:
            ast.parse(made)
            assert made.count(b"elif") == 1


@pytest.mark.parametrize(
    "content", [b"def f(:\n", b"\xef\xbb\xbfx = 1\n", b"# coding: latin-1\nx = 1\n", b"x = '\xff'\n", b"x = 1\ry = 2\n"]
)
def test_files_that_cannot_be_placed_exactly_are_not_taken(content: bytes) -> None:
    with pytest.raises(NotPython):
        PythonSource(content)


def test_windows_line_ends_and_tabs_stay() -> None:
    content = b"def f(a):\r\n\tif a < 1:\r\n\t\treturn 'x\xc3\xa9', a == 2\r\n\treturn a\r\n"
    for group in mutants_of(content).values():
        for made in group:
            assert made.count(b"\r\n") == made.count(b"\n") > 0


# --- on real packages ---


@pytest.fixture(scope="module")
def found() -> list[tuple[str, PythonSource, list[Mutation]]]:
    """A sample of the mutations of every code file of three packages."""
    sample = []
    for path, content in sorted(code_files().items()):
        source = PythonSource(content)
        everything = mutations(source)
        sample.append((path, source, random.Random(path).sample(everything, min(12, len(everything)))))
    return sample


def test_every_byte_outside_the_edits_stays(found) -> None:
    for _, source, sample in found:
        for mutation in sample:
            made = mutation.apply(source.content)
            old_at = new_at = 0
            for edit in mutation.edits:
                size = edit.start - old_at
                assert made[new_at : new_at + size] == source.content[old_at : edit.start]
                new_at += size + len(edit.text.encode())
                old_at = edit.end
            assert made[new_at:] == source.content[old_at:]


def test_mutants_parse_and_only_the_named_function_changes(found) -> None:
    checked = 0
    for path, source, sample in found:
        before = functions(source.tree)
        for mutation in sample:
            made = mutant(source, mutation)
            if made is None:
                continue
            after = functions(ast.parse(made))
            assert set(after) == set(before)
            changed = {name for name in before if before[name] != after[name]}
            innermost = {name for name in changed if not any(o.startswith(name + ".") for o in changed)}
            assert innermost == {mutation.element}, (path, mutation)
            assert changed_elements(made, source.content) == {mutation.element}
            first, last = mutation.lines
            assert 1 <= first <= last <= source.content.count(b"\n") + 1
            checked += 1
    assert checked > 60


def functions(tree: ast.Module) -> dict[str, str]:
    """Syntax tree of every element by an own walk, the oracle of `elements`; equal names are joined."""
    found: dict[str, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[prefix + child.name] = found.get(prefix + child.name, "") + ast.dump(child)
            if isinstance(child, ast.ClassDef):
                visit(child, prefix + child.name + ".")
            elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, prefix)

    visit(tree, "")
    return found


def test_comparison_kinds_change_one_operator_and_nothing_else() -> None:
    checked: Counter[str] = Counter()
    for path, content in sorted(code_files().items()):
        source = PythonSource(content)
        before = [type(node) for node in ast.walk(source.tree)]
        found = [m for m in mutations(source) if m.kind in ("compare-boundary", "compare-negate")]
        for mutation in random.Random(path).sample(found, min(8, len(found))):
            made = mutant(source, mutation)
            assert made is not None
            after = [type(node) for node in ast.walk(ast.parse(made))]
            assert sum(a is not b for a, b in zip(before, after, strict=True)) == 1
            checked[mutation.kind] += 1
    assert len(checked) == 2 and checked.total() > 20


def test_nearly_all_kinds_are_found_in_real_code() -> None:
    seen = {m.kind for content in code_files().values() for m in mutations(PythonSource(content))}
    assert len(seen) >= 25


def test_elements_agree_with_an_own_walk() -> None:
    for content in code_files().values():
        tree = parse(content)
        assert {element.name for element in elements(tree)} == set(functions(tree))


def test_the_innermost_element_of_a_line() -> None:
    found = elements(
        parse(b"x = 1\nclass A:\n    y = 2\n    @d\n    def f(self):\n        def g():\n            pass\n")
    )
    names = [element_at(found, line) for line in range(1, 8)]
    assert names == [MODULE, "A", "A", "A.f", "A.f", "A.f", "A.f"]


# --- choice and combination ---


def test_the_choice_depends_on_the_seed_alone_and_spreads_over_kinds() -> None:
    everything = [(p, m) for p, content in sorted(code_files().items()) for m in mutations(PythonSource(content))]
    chosen = choose(everything, random.Random("1"), 2)
    assert chosen == choose(everything, random.Random("1"), 2) != choose(everything, random.Random("2"), 2)
    assert max(Counter((path, mutation.element) for path, mutation in chosen).values()) == 2
    assert len({mutation.kind for _, mutation in chosen[:40]}) >= 20
    assert len(set(chosen)) == len(chosen)


def test_combined_mutations_do_not_overlap() -> None:
    made = 0
    for path, content in sorted(code_files().items()):
        source, generator = PythonSource(content), random.Random(path)
        everything = mutations(source)
        for _ in range(5):
            parts = generator.sample(everything, 2)
            both = combine(parts)
            if both is None:
                assert max(p.lines[0] for p in parts) <= min(p.lines[1] for p in parts)
                continue
            one_by_one = sorted(parts, key=lambda p: p.lines, reverse=True)
            content_after = source.content
            for part in one_by_one:  # from the end, so that the positions of the other still hold
                content_after = part.apply(content_after)
            assert both.apply(source.content) == content_after
            made += 1
    assert made > 10
