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
GRID = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
CONTEXT = {"context_parallel_size": 2}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
#: Relative; measured 1e-7 of the losses and 2e-7 of the norms at most.
TOLERANCE = 1e-5

#: Launches in order: ranks, and what they do, one layout after the other. What the layout leaves is data parallel.
LAUNCHES = [
    (1, [Task("one", 0, 8), Task("one_3", 0, 3), Task("forgetful", 3, 6, "one_3", forget_optimizer=True)]),
    (
        2,
        [
            Task("expert_3", 0, 3, None, EXPERT),
            Task("one_to_expert", 3, 6, "one_3", EXPERT),
            Task("one_to_tensor", 3, 6, "one_3", TENSOR),
            Task("expert_to_data", 3, 6, "expert_3", DATA),
        ],
    ),
    (
        4,
        [
            Task("grid_3", 0, 3, None, GRID),
            Task("one_to_grid", 3, 6, "one_3", GRID),
            Task("expert_to_grid", 3, 6, "expert_3", GRID),
            Task("context_3", 0, 3, None, CONTEXT),
            Task("grid_to_context", 3, 6, "grid_3", CONTEXT),
            Task("grid_to_expert", 3, 6, "grid_3", EXPERT),
            Task("grid_to_interleaved", 3, 6, "grid_3", INTERLEAVED),
            Task("context_to_grid", 3, 6, "context_3", GRID),
            Task("and_on_in_the_grid", 6, 8, "grid_to_context", GRID),
        ],
    ),
    (
        1,
        [
            Task("grid_to_one", 3, 6, "grid_3"),
            Task("context_to_one", 3, 6, "context_3"),
            Task("expert_to_one", 3, 6, "expert_3"),
            Task("and_back_from_the_grid", 6, 8, "one_to_grid"),
            Task("and_back_from_experts", 6, 8, "grid_to_expert"),
            Task("and_back_from_tensors", 6, 8, "one_to_tensor"),
            Task("and_back_from_the_interleaved", 6, 8, "grid_to_interleaved"),
        ],
    ),
]
TASKS = [task for _, tasks in LAUNCHES for task in tasks]
COMPARED = [task for task in TASKS if task.name not in ("one", "forgetful")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, list[list[float]]]:
    """Name of a task -> loss and gradient norm of its steps."""
    from m1.config.parallel import Parallel
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
    """The first step sees the same weights; later, fresh optimizer state shows in the gradient norm."""
    expected, forgetful = measured["one"][3:6], measured["forgetful"]
    assert forgetful[0] == pytest.approx(expected[0], rel=TOLERANCE)
    assert abs(forgetful[2][1] / expected[2][1] - 1) > 10 * TOLERANCE
