"""A checkpoint is read at any parallel layout: the training goes on with the losses of one rank that never stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from layout_worker import Task, perform

WORKER = Path(__file__).with_name("layout_worker.py")
TENSOR = {"tensor_model_parallel_size": 2}
EXPERT = {"expert_model_parallel_size": 2}
DATA: dict[str, int] = {}
#: Relative; measured 3e-7 at most.
TOLERANCE = 1e-5

#: Launches in order: ranks and what they do, one layout after the other. Steps 0 to 3, 3 to 6, 6 to 8.
LAUNCHES = [
    (1, [Task("one", 0, 8), Task("one_3", 0, 3), Task("forgetful", 3, 6, "one_3", forget_optimizer=True)]),
    (
        2,
        [
            Task("tensor_3", 0, 3, None, TENSOR),
            Task("expert_3", 0, 3, None, EXPERT),
            Task("data_3", 0, 3, None, DATA),
            Task("one_to_tensor", 3, 6, "one_3", TENSOR),
            Task("one_to_expert", 3, 6, "one_3", EXPERT),
            Task("one_to_data", 3, 6, "one_3", DATA),
            Task("tensor_to_expert", 3, 6, "tensor_3", EXPERT),
            Task("expert_to_data", 3, 6, "expert_3", DATA),
            Task("data_to_tensor", 3, 6, "data_3", TENSOR),
        ],
    ),
    (
        1,
        [
            Task("tensor_to_one", 3, 6, "tensor_3"),
            Task("expert_to_one", 3, 6, "expert_3"),
            Task("data_to_one", 3, 6, "data_3"),
            Task("tensor_and_back", 6, 8, "one_to_tensor"),
            Task("expert_and_back", 6, 8, "one_to_expert"),
            Task("tensor_expert_and_back", 6, 8, "tensor_to_expert"),
        ],
    ),
]
TASKS = [task for _, tasks in LAUNCHES for task in tasks]
COMPARED = [task for task in TASKS if task.name not in ("one", "forgetful")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, list[list[float]]]:
    """Name of a task -> loss and gradient norm of its steps."""
    from m1.profile import Parallel
    from m1.training import parallel

    folder, root = tmp_path_factory.mktemp("layouts"), WORKER.parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    for ranks, tasks in LAUNCHES:
        if ranks == 1:
            parallel.initialize(Parallel(), 1)
            for task in tasks:
                perform(folder, task)
            continue
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        arguments = [str(WORKER), str(folder), json.dumps([asdict(task) for task in tasks])]
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    return {task.name: json.loads((folder / f"{task.name}.json").read_text()) for task in TASKS}


@pytest.mark.parametrize("task", COMPARED, ids=lambda task: task.name)
def test_losses_are_those_of_one_rank_that_never_stopped(measured, task) -> None:
    expected = measured["one"][task.first : task.last]
    assert measured[task.name] == [pytest.approx(step, rel=TOLERANCE) for step in expected]


def test_an_optimizer_that_forgot_would_be_noticed(measured) -> None:
    """The first step sees the same weights; from the second on, fresh optimizer state shows in the loss."""
    expected, forgetful = measured["one"][3:6], measured["forgetful"]
    assert forgetful[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert abs(forgetful[1][0] / expected[1][0] - 1) > 10 * TOLERANCE
