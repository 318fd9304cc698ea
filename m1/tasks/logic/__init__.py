"""Problem generators with verifiers, one file per task; names and kinds follow SynLogic (arXiv 2505.19641 §2.2)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from m1.tasks.logic.base import LEVELS, Problem, Task


class _Tasks(Mapping[str, Task]):
    """Every task by name; a task's module is imported when the task is asked for."""

    _names = tuple(sorted(file.stem for file in (Path(__file__).parent / "tasks").glob("[a-z]*.py")))

    def __getitem__(self, name: str) -> Task:
        if name not in self._names:
            raise KeyError(name)
        return importlib.import_module(module_of(name)).TASK

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


TASKS: Mapping[str, Task] = _Tasks()


def module_of(name: str) -> str:
    """The module of a task."""
    return f"m1.tasks.logic.tasks.{name}"


__all__ = ["LEVELS", "TASKS", "Problem", "Task", "module_of"]
