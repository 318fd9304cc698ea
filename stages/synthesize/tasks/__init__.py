"""Problem generators with verifiers, one file per task; names and kinds follow SynLogic (arXiv 2505.19641 §2.2)."""

from __future__ import annotations

from stages.synthesize.tasks import (
    arithmetic,
    boolean_expressions,
    dyck_language,
    goods_exchange,
    object_counting,
    operation,
    space_reasoning,
    web_of_lies,
    word_sorting,
)
from stages.synthesize.tasks.base import LEVELS, Problem, Task

_MODULES = (
    arithmetic,
    boolean_expressions,
    dyck_language,
    goods_exchange,
    object_counting,
    operation,
    space_reasoning,
    web_of_lies,
    word_sorting,
)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}

__all__ = ["LEVELS", "TASKS", "Problem", "Task"]
