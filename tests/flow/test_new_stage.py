"""A new stage is one folder below stages/ and a profile that asks for it: everything else follows from its record."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import scratch
import yaml
from test_plan import make_data

from m1 import paths
from m1.data import dvc
from m1.run import derived
from m1.run.registry import stages

ORDER = ["corpus", "tokenizer", "tokens", "extra", "sft-data", "pretrain", "extra-training", "sft"]


RUN_DATA_STAGE = """
import sys
from infra import launch
from m1.run import profiles
print(launch.run_data_stage(profiles.load("scratch"), sys.argv[1], lambda line: None).digest)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with a data stage and a training stage more; the data of the other stages is there."""
    made = scratch.make(tmp_path_factory.mktemp("new") / "checkout")
    scratch.add_extra_stages(made, order=ORDER, parallel__world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "ROOT", made)
        make_data(made)
        dvc.ensure_profile("scratch")
    python(made, "-c", RUN_DATA_STAGE, "corpus")
    return made


def plan(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Rows of `m1 plan` by stage, in its order."""
    return {
        row["stage"]: row
        for row in json.loads(scratch.m1(folder, "plan", "--profile", "scratch", "--json", *arguments).stdout)["stages"]
    }


def python(folder: Path, *arguments: str) -> str:
    return scratch.run([sys.executable, *arguments], folder).stdout


def test_files_of_the_repository_are_those_that_the_records_make() -> None:
    assert (paths.ROOT / "dvc.yaml").read_text() == derived.dvc_yaml()
    assert (paths.ROOT / "prefect.yaml").read_text() == derived.prefect_yaml()


def test_dvc_and_prefect_read_them_as_they_are_meant() -> None:
    data = yaml.safe_load(derived.dvc_yaml())["stages"]
    assert list(data) == [name for name, record in stages().items() if record.makes_data]
    for name, entry in data.items():
        record = stages()[name]
        assert entry["do"]["cmd"] == f"python -m {record.package} --profile ${{item}}"
        assert entry["do"]["outs"] == [f"data/${{item}}/{name}"]
        assert set(entry["do"]["params"][0]["profiles/${item}.yaml"]) == {name, *record.settings}
        assert {f"data/${{item}}/{read}" for read in record.reads} <= set(entry["do"]["deps"])
    deployments = {entry["name"]: entry for entry in yaml.safe_load(derived.prefect_yaml())["deployments"]}
    assert list(deployments) == ["full", *stages()]
    for name, record in stages().items():
        assert deployments[name]["description"] == record.about
        assert deployments[name]["parameters"] == {"profile": "tiny", "only": [name]}


def test_it_is_planned_in_its_place_before_anybody_has_heard_of_it(folder: Path) -> None:
    rows = plan(folder)
    assert list(rows) == ORDER
    assert (rows["extra"]["action"], rows["extra"]["reason"]) == ("run", "never run")
    assert rows["extra-training"]["action"] == "run" and rows["extra-training"]["tokens"] == 4000
    assert "extra" in rows["extra-training"]["reason"] and "extra-training" in rows["sft"]["reason"]
    shown = scratch.m1(folder, "plan", "--profile", "scratch").stdout
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("extra")][:2] == [
        "extra",
        "extra-training",
    ]


def test_a_profile_that_asks_for_it_wrongly_is_refused(folder: Path) -> None:
    for change, words in (
        ("extra-training.amuont=1", "did you mean amount"),
        ("order=[corpus, tokenizer, tokens, pretrain, extra-training, extra]", "extra-training reads extra"),
    ):
        done = scratch.m1(folder, "plan", "--profile", "scratch", "--set", change, check=False)
        assert done.returncode == 2 and words in done.stderr, done.stderr


def test_it_runs_by_itself(folder: Path) -> None:
    python(folder, "-m", "stages.extra", "--profile", "scratch")
    assert (folder / "data" / "scratch" / "extra" / "rows.jsonl").read_text().count("number") == 3
    assert json.loads((folder / "data" / "scratch" / "extra" / "summary.json").read_text()) == {"rows": 3}


def test_profiles_that_do_not_ask_for_it_are_as_good_as_before(folder: Path) -> None:
    assert "extra" not in scratch.m1(folder, "plan", "--profile", "tiny", "--stop", "tokens").stdout
    done = scratch.run([sys.executable, "-m", "stages.extra", "--profile", "tiny"], folder, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: profile tiny does not ask for extra.")


def test_dvc_and_prefect_list_it_once_the_files_are_written_anew(folder: Path) -> None:
    update = "from m1.run import derived; print(*derived.update())"
    assert python(folder, "-c", update).split() == ["dvc.yaml", "prefect.yaml"]
    assert python(folder, "-c", update).split() == []
    entry = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]["extra"]["do"]
    assert entry["cmd"] == "python -m stages.extra --profile ${item}"
    assert {"stages/extra/run.py", "m1/files.py", "data/${item}/corpus"} <= set(entry["deps"])
    assert "stages/extra/stage.py" not in entry["deps"], "what it says of itself makes nothing anew"
    deployments = yaml.safe_load((folder / "prefect.yaml").read_text())["deployments"]
    told = {entry["name"]: (entry["description"], entry["parameters"]["only"]) for entry in deployments[1:]}
    assert told["extra"] == ("Rows that a test asks for.", ["extra"])
    assert told["extra-training"] == ("Weights that a test asks for.", ["extra-training"])


def test_the_flows_command_records_it_with_dvc(folder: Path) -> None:
    digest = python(folder, "-c", RUN_DATA_STAGE, "extra").strip()
    assert digest.endswith(".dir")
    assert plan(folder)["extra"]["action"] == "skip"
    scratch.add_extra_stages(folder, order=ORDER, parallel__world_size=1, extra__amount=5)
    assert plan(folder)["extra"]["reason"] == "profile: extra.amount 3 -> 5"
    scratch.add_extra_stages(folder, order=ORDER, parallel__world_size=1)
    assert digest[:8] in scratch.m1(folder, "data", "--profile", "scratch").stdout


def test_training_goes_on_from_it(folder: Path) -> None:
    python(folder, "-m", "stages.pretrain", "--profile", "scratch")
    python(folder, "-m", "stages.extra_training", "--profile", "scratch")
    (run,) = (folder / "runs" / "scratch" / "extra-training").iterdir()
    assert json.loads((run / "checkpoint" / "state.json").read_text()) == {"step": 1, "rows": 3}
    rows = plan(folder, "--only", "extra-training", "--only", "sft")
    assert (rows["extra-training"]["action"], rows["sft"]["action"]) == ("skip", "run")
    assert f"runs/scratch/extra-training/{run.name}" in rows["sft"]["inputs"]
    scratch.add_extra_stages(folder, order=ORDER, parallel__world_size=1, extra_training__amount=6)
    assert (
        plan(folder, "--only", "extra-training")["extra-training"]["reason"] == "profile: extra-training.amount 4 -> 6"
    )
    scratch.add_extra_stages(folder, order=ORDER, parallel__world_size=1)


def test_the_report_tells_of_it(folder: Path) -> None:
    told = scratch.m1(folder, "report", "--profile", "scratch").stdout
    page = Path(told.split()[-1]).read_text(encoding="utf-8")
    for words in ("extra-training", "Rows that a test asks for.", "Weights that a test asks for."):
        assert words in page
