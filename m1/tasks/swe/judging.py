"""Answers to software-engineering tasks, judged in sandboxes of this rank's own.

Responses on which the sandbox itself fails are not judged: they are neither right nor wrong, and are not counted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import torch.distributed

from m1 import chat
from m1.config.families import SwePrompts
from m1.errors import M1Error, UsageError
from m1.run.stop_signal import StopSignal
from m1.tasks.base import Row, Setting, Verdict
from m1.tasks.sandbox import Limits, Sandbox, Sandboxes
from m1.tasks.swe.reward import LIMITS, NO_ANSWER, End, judge
from m1.tasks.swe.tasks import SET, TaskSet
from m1.training.stopping import StopRequested

#: Seconds between two looks for a request to stop.
_LOOK_SECONDS = 0.5


@contextlib.contextmanager
def opened(setting: Setting) -> Iterator[SandboxJudge]:
    """A judge with one sandbox for each environment of the set; every rank takes part.

    Raises:
        ServiceError: the engine does not do its work.
    """
    part = setting.prompts
    assert isinstance(part, SwePrompts)
    tasks = TaskSet(setting.folder / SET)
    limits = replace(LIMITS, seconds=part.test_seconds)
    sandboxes = setting.tools.sandboxes()
    with contextlib.ExitStack() as stack:
        images = _images(setting.rank, sandboxes, tasks)
        made = {
            name: stack.enter_context(sandboxes.open(image, warm=part.workers, limits=limits))
            for name, image in images.items()
        }
        yield SandboxJudge(tasks, made, part.workers, limits)


def _images(rank: int, sandboxes: Sandboxes, tasks: TaskSet) -> dict[str, str]:
    """Images by environment, made by rank 0 where they are missing, so that no two ranks do the same work."""
    if rank != 0:
        torch.distributed.barrier()
    names = sorted({task.environment for task in tasks.tasks})
    images = {name: sandboxes.build(name, tasks.environments[name]) for name in names}
    if rank == 0:
        torch.distributed.barrier()
    return images


class SandboxJudge:
    """Judges responses to the tasks of one set, `workers` of them at a time.

    Args:
        sandboxes: by the name of the tasks' environment.
        limits: of one run of tests.
    """

    def __init__(self, tasks: TaskSet, sandboxes: Mapping[str, Sandbox], workers: int, limits: Limits = LIMITS) -> None:
        self._tasks, self._sandboxes = tasks, sandboxes
        self._workers, self._limits = workers, limits
        self._by_id = {task.id: task for task in tasks.tasks}

    def judge(self, asked: Sequence[tuple[Row, str]], stop: StopSignal | None = None) -> list[Verdict]:
        """Verdicts on (row of the task, response), in order; equal responses to a task are judged once.

        Args:
            stop: once it is requested, judging is abandoned; all ranks take part.

        Raises:
            StopRequested: on every rank.
            UsageError: the set is not complete.
        """
        keys = [(str(row.state["task"]), text) for row, text in asked]
        threads = ThreadPoolExecutor(self._workers, thread_name_prefix="swe-judge")
        found = {key: threads.submit(self._one, *key) for key in dict.fromkeys(keys)}
        waiting = set(found.values())
        try:
            while waiting and not (stop is not None and stop.noticed()):
                _, waiting = wait(waiting, timeout=_LOOK_SECONDS)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        if stop is not None and stop.agreed():
            raise StopRequested
        return [found[key].result() for key in keys]

    def _one(self, task_id: str, response: str) -> Verdict:
        parsed = chat.parse_response(response)
        if parsed is None:
            return Verdict(value=0.0, correct=False, formatted=False, end=NO_ANSWER)
        task = self._by_id[task_id]
        try:
            judged = judge(self._sandboxes[task.environment], self._tasks, task, parsed[1], limits=self._limits)
        except UsageError:
            raise
        except M1Error as error:
            return Verdict(value=math.nan, correct=False, formatted=True, message=error.what, judged=False)
        correct = judged.end is End.RESOLVED
        return Verdict(judged.value, correct, formatted=True, end=judged.end.value, message=judged.message)
