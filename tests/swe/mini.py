"""A package of two functions with a fault in each, as a set of tasks: made by hand, so that it takes no time."""

from __future__ import annotations

from pathlib import Path

from infra.sandbox.images import DEFAULT_REQUIREMENTS
from m1.tasks.swe.patches import Tree, make_diff
from m1.tasks.swe.tasks import SweTask, TaskSet, dump, write_environments, write_tests, write_tree

BASE = "0123456789ab"
RIGHT: Tree = {
    "mini.py": b'def double(x):\n    """Twice x."""\n    return x + x\n\n\ndef shout(text):\n    return text.upper()\n',
    "test_mini.py": (
        b"from mini import double, shout\n\n\ndef test_double():\n    assert double(3) == 6\n\n\n"
        b"def test_shout():\n    assert shout('a') == 'A'\n"
    ),
}
#: By the function that is wrong: its code, its test, a test that finds the fault.
FAULTS = {
    "double": (b"x + x", b"x * x", "assert double(3) == 6"),
    "shout": (b"text.upper()", b"text.lower()", "assert shout('b') == 'B'"),
}


def faulty(name: str) -> Tree:
    right, wrong, _ = FAULTS[name]
    return {**RIGHT, "mini.py": RIGHT["mini.py"].replace(right, wrong)}


def written_test(name: str) -> str:
    """A right answer to the task of writing a test."""
    return f"```python\nfrom mini import {name}\n\n\ndef test_it():\n    {FAULTS[name][2]}\n```"


def task(name: str, kind: str, split: str, environment: str = "python") -> SweTask:
    return SweTask(
        id=f"{name}-{kind}-{split}-{environment}", kind=kind, bug=f"{name}-{split}", source="mini", base=BASE,  # type: ignore[arg-type]
        licence="MIT", split=split, environment=environment, origin="mutation", mutations=("operator",),  # type: ignore[arg-type]
        issue=f"`{name}` is wrong.\n", setup_patch=make_diff(RIGHT, faulty(name)),
        gold_patch=make_diff(faulty(name), RIGHT), locations=(("mini.py", name),),
        fail_to_pass=(f"test_mini.py::test_{name}",),
    )  # fmt: skip


def write_set(folder: Path, tasks: list[SweTask]) -> TaskSet:
    place = folder / "sources" / "mini"
    place.mkdir(parents=True)
    write_tree(place / f"{BASE}.tar.gz", RIGHT)
    write_tests(place / f"{BASE}.json", ["test_mini.py::test_double", "test_mini.py::test_shout"])
    (folder / "tasks.jsonl").write_text("".join(dump(task) + "\n" for task in tasks))
    write_environments(folder, {"python": list(DEFAULT_REQUIREMENTS)})
    return TaskSet(folder)


def is_code(path: str) -> bool:
    return path == "mini.py"
