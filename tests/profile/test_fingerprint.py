"""The identity of a stage: what changes it and what does not."""

from __future__ import annotations

import pytest
from m1.stage import STAGE_INFO, code_digest

from m1 import paths
from m1.run import profiles as profile
from m1.run.identity import fingerprint

DATA = {"tokenizer": "a" * 32, "tokens": "b" * 32}


def identity(stage: str, data: dict[str, str] = DATA, parent: str | None = None, **overrides: object) -> str:
    changed = {name.replace("__", ".").replace("rl_40k", "rl-40k"): value for name, value in overrides.items()}
    return fingerprint(stage, profile.load("tiny", overrides=changed), data, parent, [])


@pytest.mark.parametrize("stage", ["pretrain", "sft", "context-extension", "rl-40k", "rl-80k"])
def test_its_own_section_model_data_parent_and_seed_count(stage: str) -> None:
    same = identity(stage)
    assert same == identity(stage)
    assert same != identity(stage, model__hidden_size=64)
    assert same != identity(stage, seed=5)
    assert same != identity(stage, parent="f" * 64)
    assert same != identity(stage, data={**DATA, "tokens": "c" * 32})


def test_another_stages_section_does_not_count() -> None:
    assert identity("pretrain") == identity("pretrain", sft__epochs=3.0)
    assert identity("sft") != identity("sft", sft__epochs=3.0)
    assert identity("rl-80k") == identity("rl-80k", rl_40k__train_steps=3)


def test_comments_and_docstrings_do_not_count_but_code_does(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    file = tmp_path / "stage.py"

    def digest(text: str) -> str:
        file.write_text(text)
        return code_digest(("stage.py",))

    original = digest('"""A stage."""\n\n\ndef run(x):\n    """Run."""\n    return x + 1\n')
    assert original == digest("def run(x):\n    # adds one\n    return x + 1\n")
    assert original != digest("def run(x):\n    return x + 2\n")


def test_every_stage_names_code_that_exists_and_its_own_module() -> None:
    for stage, info in STAGE_INFO.items():
        for entry in info.code:
            assert (paths.ROOT / entry).exists(), f"{stage}: {entry}"
        assert (paths.ROOT / info.module.replace(".", "/") / "__main__.py").is_file()
        assert any(info.module.replace(".", "/") == entry for entry in info.code), stage
        for section in info.sections:
            profile.load("tiny").section(section)
