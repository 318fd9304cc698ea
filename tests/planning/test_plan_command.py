"""`m1 plan`: for machines, for a hundred columns, and refusals."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from m1.cli.app import app
from m1.errors import UsageError

RUNNER = CliRunner()


def plan(*arguments: str, code: int = 0) -> str:
    result = RUNNER.invoke(app, ["plan", "--profile", "m1-456b", *arguments], env={"COLUMNS": "100"})
    if isinstance(result.exception, UsageError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    figure = tmp_path_factory.mktemp("figure") / "decode.png"
    return json.loads(plan("--json", "--figure", str(figure)))


def test_numbers_for_machines(content):
    assert round(content["parameters"] / 1e9, 2) == 456.09
    assert round(content["active_parameters"] / 1e9, 3) == 45.943
    assert content["checkpoint_bytes"] == 912_210_767_872
    stages = {row["stage"]: row for row in content["stages"]}
    assert stages["pretrain"]["tokens"] == pytest.approx(7.5e12, rel=1e-4)
    assumed = content["assumptions"]
    for row in (row for row in stages.values() if row["gpu_hours"]):
        assert row["dollars"] == pytest.approx(row["gpu_hours"] * assumed["dollars"])
    hours = stages["pretrain"]["flops"] / (assumed["peak_flops"] * assumed["mfu"]) / 3600
    assert stages["pretrain"]["gpu_hours"] == pytest.approx(hours)
    rl = content["reinforcement_learning"]
    assert (rl["published"]["gpu_hours"], rl["published"]["dollars"]) == (258_048, 534_700)
    assert all(row["total"] == pytest.approx(sum(row[p] for p in PARTS)) for row in content["memory"])
    assert all(row["fits"] for row in content["memory"])


PARTS = ("parameters", "gradients", "optimizer", "activations", "logits")


def test_the_figure_is_where_the_command_says(content):
    with open(content["figure"], "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_tables_keep_to_a_hundred_columns(tmp_path):
    shown = plan("--figure", str(tmp_path / "decode.png"))
    lines = [line for line in shown.splitlines() if not line.startswith("figure: ")]
    assert max(map(len, lines)) <= 100
    for words in ("memory of the fullest rank", "512 H800 for three weeks", "534,700", "figure itself", "pretrain"):
        assert words in shown


def test_layouts_that_do_not_fit_say_what_would():
    found = json.loads(plan("--layouts", "--gpus", "64", "--json", code=1))
    assert found["layouts"] == [] and found["smallest_gpus"] > 64
    said = " ".join(plan("--layouts", "--gpus", "64", code=1).split())
    assert f"The smallest number that would: {found['smallest_gpus']}." in said


def test_layouts_table():
    shown = plan("--layouts", "--stage", "context-extension 4")
    assert max(map(len, shown.splitlines())) <= 100
    assert "layouts fit 512 GPUs of 80 GB" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "parallel.tensor_model_parallel_size=3"], "multiple"),
        (["--set", "parallel.expert_model_parallel_size=64"], "num_experts=32 is not a multiple of"),
        (["--set", "parallel.pipeline_model_parallel_size=64", "--set", "parallel.context_parallel_size=1",
          "--set", "parallel.expert_model_parallel_size=1"],
         "num_layers=80 is not a multiple of"),
        (["--set", "pretrain.sequence_length=8200"], "sequence_length=8200 is not a multiple of"),
        (["--layouts", "--stage", "rehearse"], "Choose from: pretrain, context-extension 1"),
        (["--gpus", "8"], "belong to --layouts"),
    ],
)  # fmt: skip
def test_refusals_name_the_rule(arguments, words):
    with pytest.raises(UsageError, match=words):
        plan(*arguments)
