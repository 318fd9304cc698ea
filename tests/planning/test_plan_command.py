"""`m1 plan`: for machines, for a hundred columns, and refusals; with and without a sandbox engine."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from infra.sandbox import engine
from m1 import cli
from m1.cli.app import app
from m1.errors import ServiceError, UsageError

RUNNER = CliRunner()
#: What this version cannot do with the layout of m1-456b; everything else of its plan stands.
TOO_EARLY = "but rollouts need the whole model on every rank"


@pytest.fixture(scope="module", autouse=True)
def no_engine():
    """A plan needs none, also where the profile would fail without one; so it is the same on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "missing", lambda: ServiceError("no Docker engine answers", "Start one."))
        yield


def plan(*arguments: str, code: int = 0) -> str:
    """What is printed; a refusal is raised."""
    result = RUNNER.invoke(app, ["plan", "--profile", "m1-456b", *arguments], env={"COLUMNS": "100"})
    if isinstance(result.exception, UsageError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def whole_plan(*arguments: str) -> str:
    """The plan of every stage, which is printed in full before reinforcement learning is refused."""
    result = RUNNER.invoke(app, ["plan", "--profile", "m1-456b", *arguments], env={"COLUMNS": "100"})
    assert isinstance(result.exception, UsageError), result.output
    assert TOO_EARLY in str(result.exception) and "pretrain:" not in str(result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    figure = tmp_path_factory.mktemp("figure") / "decode.png"
    return json.loads(whole_plan("--json", "--figure", str(figure)))


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


def test_what_stands_in_the_way_is_said_for_machines_too(content):
    assert {line.partition(":")[0] for line in content["refused"]} == {"rl-40k", "rl-80k"}
    assert all("tensor_model_parallel_size=8" in line and TOO_EARLY in line for line in content["refused"])
    (unmet,) = content["unmet"]
    assert unmet.startswith("synthesize, rl-40k, rl-80k, evaluate: no Docker engine answers")
    assert unmet.endswith("Start one.")


def test_a_refusal_ends_the_command_with_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    """As a user's shell sees it: the plan on stdout, what is wrong on stderr."""
    figure = str(tmp_path / "decode.png")
    monkeypatch.setattr(sys, "argv", ["m1", "plan", "--profile", "m1-456b", "--figure", figure])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    note, error = said.err.splitlines()
    assert ended.value.code == 2
    assert (
        error.startswith("error: rl-40k: parallel.tensor") and TOO_EARLY in error and "leave these stages out" in error
    )
    assert note.startswith("note: a run would stop here: synthesize, rl-40k")
    assert "memory of the fullest rank" in said.out and f"figure: {figure}" in said.out


def test_stages_that_are_possible_are_planned_and_nothing_is_refused(tmp_path):
    """The data stages need an engine, by the wish of the profile: a note, since a plan starts nothing."""
    shown = plan("--stop", "synthesize", "--figure", str(tmp_path / "decode.png"))
    assert "pretrain" in shown and "rl-40k" not in shown.partition("memory of the fullest rank")[0]


PARTS = ("parameters", "gradients", "optimizer", "activations", "logits")


def test_the_figure_is_where_the_command_says(content):
    with open(content["figure"], "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_tables_keep_to_a_hundred_columns(tmp_path):
    shown = whole_plan("--figure", str(tmp_path / "decode.png"))
    lines = [line for line in shown.splitlines() if not line.startswith("figure: ")]
    assert max(map(len, lines)) <= 100
    for words in ("memory of the fullest rank", "512 H800 for three weeks", "534,700", "figure itself", "pretrain"):
        assert words in shown


def test_layouts_that_do_not_fit_say_what_would():
    found = json.loads(plan("--layouts", "--gpus", "64", "--json", code=1))
    assert found["layouts"] == [] and found["smallest_gpus"] > 64
    said = " ".join(plan("--layouts", "--gpus", "64", code=1).split())
    assert f"The smallest number that would: {found['smallest_gpus']}." in said


def test_numbers_do_not_depend_on_an_engine(content, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "missing", lambda: None)
    other = json.loads(whole_plan("--json", "--figure", str(tmp_path / "decode.png")))
    assert other["unmet"] == [] and content["unmet"] != []
    for part in ("memory", "reinforcement_learning", "decoding", "refused", "parameters"):
        assert other[part] == content[part]
    for one, two in zip(other["stages"], content["stages"], strict=True):
        assert {name: one[name] for name in ("stage", "tokens", "gpu_hours", "dollars")}.items() <= two.items()


def test_a_cluster_whose_gpus_are_too_small_is_refused_with_the_stage_and_the_numbers():
    with pytest.raises(UsageError, match=r"pretrain: the fullest rank would need [\d.]+ GB of 38 GB .*--layouts"):
        plan("--gpu-memory", "38", "--stop", "pretrain", "--no-cost")


def test_single_gpu_fits_the_card_it_is_for():
    arguments = ["plan", "--profile", "single-gpu", "--gpu-memory", "24"]
    result = RUNNER.invoke(app, arguments, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    assert "1 rank:" in result.stdout and "at most 22.1 of 24 GB" in result.stdout


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
