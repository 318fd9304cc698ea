"""dvc.yaml and the stages' own table say the same: commands, code, sections, inputs."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from m1.stage import STAGE_INFO

from m1 import paths
from m1.run.profiles import DATA_STAGES

#: Settings that decide a stage's output besides its own section; the others are not read by its code.
PARAMS = {
    "corpus": {"corpus", "seed"},
    "tokenizer": {"tokenizer", "model.vocab_size"},
    "tokens": {"tokens"},
    "sft-data": {"sft-data", "seed"},
    "synthesize": {"synthesize", "seed"},
}


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    return yaml.safe_load((paths.ROOT / "dvc.yaml").read_text())["stages"]


def test_lists_the_data_stages(stages: dict[str, Any]) -> None:
    assert tuple(stages) == DATA_STAGES


@pytest.mark.parametrize("name", DATA_STAGES)
def test_stage(stages: dict[str, Any], name: str) -> None:
    assert stages[name]["foreach"] == "${profiles}"
    stage = stages[name]["do"]
    assert stage["cmd"] == f"python -m {STAGE_INFO[name].module} --profile ${{item}}"
    assert stage["outs"] == [f"data/${{item}}/{name}"]
    assert stage["params"] == [{"profiles/${item}.yaml": sorted(PARAMS[name], key=lambda key: (key != name, key))}]
    code = [dep for dep in stage["deps"] if not dep.startswith("data/")]
    assert all((paths.ROOT / dep).exists() for dep in code)
    for entry in STAGE_INFO[name].code:
        assert any(entry == dep or entry.startswith(dep + "/") for dep in code)
    upstream = [dep.rpartition("/")[2] for dep in stage["deps"] if dep.startswith("data/")]
    assert all(DATA_STAGES.index(other) < DATA_STAGES.index(name) for other in upstream)
