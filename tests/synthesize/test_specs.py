"""The data specs say what the code does."""

from __future__ import annotations

from dataclasses import fields

import yaml

from m1 import paths
from m1.tasks.base import Row
from m1.tasks.logic import LEVELS, TASKS


def test_specs_describe_every_task_once_and_as_it_is() -> None:
    described = {}
    for spec in ("logic", "maths"):
        content = yaml.safe_load((paths.DATA_SPECS / f"{spec}.yaml").read_text())
        assert content["licence"] == "Apache-2.0"
        assert set(content["fields"]) == {field.name for field in fields(Row)}
        assert not described.keys() & content["tasks"].keys()
        described |= content["tasks"]
    assert described.keys() == TASKS.keys()
    for name, task in TASKS.items():
        expected = {
            "about": task.about,
            "answer": task.answer_format,
            "wordings": list(task.templates),
            "levels": {level: task.knobs(level) for level in LEVELS},
        }
        assert described[name] == expected, f"data_specs: {name} differs from m1/tasks/logic/tasks/{name}.py"


def test_every_knob_is_explained() -> None:
    for name, task in TASKS.items():
        text = type(task).__doc__ or ""
        for knob in task.knobs(1):
            assert f"`{knob}`" in text, f"{name}: knob {knob} is not in its docstring"
