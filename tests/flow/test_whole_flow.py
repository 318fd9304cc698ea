"""Every step of the recipe for real, at the size of `smoke`: real stages, Prefect, MLflow and DVC, in a copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m1.run import profiles as profile
from m1.run.registry import data_stages, training_stages
from tests import faults
from tests.checkout import copy_checkout

pytestmark = pytest.mark.flow


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout under git, without data, runs or services; its services are stopped at the end."""
    folder = copy_checkout(tmp_path_factory.mktemp("whole") / "checkout")
    yield folder
    m1(folder, "down")


def m1(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "NO_COLOR": "1", "COLUMNS": "200"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", *(words if words[0] == "dvc" else ("m1", *words))],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def results(folder: Path) -> dict[str, dict]:
    files = folder.glob("runs/smoke/*/*/result.json")
    return {(content := json.loads(file.read_text()))["stage"]: content for file in files}


@pytest.fixture(scope="module")
def first(copy: Path) -> subprocess.CompletedProcess[str]:
    return m1(copy, "run", "--profile", "smoke")


def test_the_whole_recipe_runs(copy: Path, first: subprocess.CompletedProcess[str]) -> None:
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-4000:]
    order = profile.load("smoke").order
    assert set(results(copy)) == set(order) - set(data_stages())
    for stage in order:
        assert stage in first.stdout
    assert "http://127.0.0.1" in first.stdout


def test_dvc_has_nothing_to_do_afterwards(copy: Path, first: subprocess.CompletedProcess[str]) -> None:
    status = m1(copy, "dvc", "status")
    lines = [line for line in status.stdout.splitlines() if "smoke" in line]
    assert status.returncode == 0 and not lines, status.stdout


def test_the_second_run_skips_every_stage(copy: Path, first: subprocess.CompletedProcess[str]) -> None:
    before = {stage: result["finished_at"] for stage, result in results(copy).items()}
    again = m1(copy, "run", "--profile", "smoke")
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-4000:]
    assert {stage: result["finished_at"] for stage, result in results(copy).items()} == before


def test_the_lineage_of_a_model_reaches_every_data_hash(copy: Path, first: subprocess.CompletedProcess[str]) -> None:
    tree = m1(copy, "lineage", "m1-smoke@rl-80k")
    assert tree.returncode == 0, tree.stderr
    for stage in training_stages(profile.load("smoke")):
        assert stage in tree.stdout
    recorded = results(copy)["rl-80k"]["request"]["data_digests"]
    for digest in recorded.values():
        assert digest[:8] in tree.stdout


def test_the_exported_model_loads_in_transformers(copy: Path, first: subprocess.CompletedProcess[str]) -> None:
    from transformers import AutoTokenizer, MiniMaxForCausalLM

    folder = next(copy.glob("runs/smoke/export/*/model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = MiniMaxForCausalLM.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2+3?"}], add_generation_prompt=True)
    ids = text["input_ids"] if isinstance(text, dict) or hasattr(text, "keys") else text
    assert len(ids) > 4 and model.config.num_hidden_layers == 8


def test_two_kills_change_nothing(copy: Path, first: subprocess.CompletedProcess[str]) -> None:
    """The short form of `python -m tests.faults`; the last of these tests, as it removes what the others look at."""
    assert first.returncode == 0
    found = list(faults.campaign(copy, kills=2, seed=3, length=60.0, reference=faults.made(copy)))
    assert [fault for fault in found if isinstance(fault, str)] == [], found
    assert len(found) == 2
