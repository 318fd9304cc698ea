"""dvc.yaml says what the stages' records say: commands, code, sections, inputs."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from m1 import paths
from m1.run import derived, profiles
from m1.run.identity import files_of, modules_of
from m1.run.registry import data_stages, stage

#: Settings that decide a stage's output besides its own section; the others are not read by its code.
PARAMS = {
    "corpus": {"corpus", "seed"},
    "tokenizer": {"tokenizer", "model.vocab_size"},
    "tokens": {"tokens"},
    "sft-data": {"sft-data", "seed"},
    "synthesize": {"synthesize", "seed"},
}
READS = {
    "corpus": [],
    "tokenizer": ["corpus"],
    "tokens": ["corpus", "tokenizer"],
    "sft-data": [],
    "synthesize": ["tokenizer", "sft-data"],
}


@pytest.fixture(scope="module")
def listed() -> dict[str, Any]:
    return yaml.safe_load((paths.ROOT / "dvc.yaml").read_text())["stages"]


def test_lists_the_data_stages(listed: dict[str, Any]) -> None:
    assert tuple(listed) == data_stages() and set(listed) == set(PARAMS)


def test_is_what_m1_up_would_write() -> None:
    assert (paths.ROOT / "dvc.yaml").read_text() == derived.dvc_yaml()


@pytest.mark.parametrize("name", PARAMS)
def test_stage(listed: dict[str, Any], name: str) -> None:
    record = stage(name)
    assert listed[name]["foreach"] == "${profiles}"
    do = listed[name]["do"]
    assert do["cmd"] == f"python -m {record.package} --profile ${{item}}"
    assert do["outs"] == [f"data/${{item}}/{name}"]
    assert do["params"] == [{"profiles/${item}.yaml": sorted(PARAMS[name], key=lambda key: (key != name, key))}]
    code = [dep for dep in do["deps"] if not dep.startswith("data/")]
    assert all((paths.ROOT / dep).exists() for dep in code)
    for known in profiles.available():
        profile = profiles.load(known)
        for file in [*files_of(modules_of(record, profile)[0]), *record.files(profile)]:
            entry = str(file.relative_to(paths.ROOT))
            assert any(entry == dep or entry.startswith(dep + "/") for dep in code), f"{known} reads {entry}"
    upstream = [dep.rpartition("/")[2] for dep in do["deps"] if dep.startswith("data/")]
    assert upstream == READS[name]
    assert all(data_stages().index(other) < data_stages().index(name) for other in upstream)
