"""Profiles: what is refused, and in which words; the learning-rate schedule; the order of the stages."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from m1 import paths
from m1.config.training import LearningRate
from m1.errors import UsageError
from m1.run import profiles as profile
from m1.run.registry import parent_of


@pytest.mark.parametrize("name", profile.available())
def test_every_shipped_profile_is_valid(name: str) -> None:
    assert profile.load(name).name == name


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"pretrain.train_step": 3}, ["tiny.yaml", "pretrain.train_step", "unknown field", "train_steps?"]),
        ({"pretrian": {}}, ["pretrian", "unknown field", "pretrain?"]),
        ({"model.hidden_size": "128"}, ["model.hidden_size", "integer", "'128'"]),
        ({"model.hidden_size": 128.5}, ["model.hidden_size", "integer", "128.5"]),
        ({"seed": True}, ["seed", "integer", "True"]),
        ({"sft.learning_rate.max": -1.0}, ["sft.learning_rate.max", "greater than 0", "-1.0"]),
        ({"sft.learning_rate.decay": "cosinus"}, ["sft.learning_rate.decay", "'cosine'", "'cosinus'"]),
        ({"rl-40k.objective": "grpo"}, ["rl-40k.objective", "cispo"]),
        ({"parallel.tensor_model_parallel_size": 3}, ["world_size=2", "tensor x pipeline x context parallel = 3"]),
        ({"parallel.world_size": 3}, ["global_batch_size", "data-parallel size 3"]),
        ({"model.num_attention_heads": 3}, ["num_attention_heads=3", "num_query_groups=2"]),
        ({"model.moe_router_topk": 9}, ["moe_router_topk=9", "num_experts=4"]),
        ({"context-extension.stages": []}, ["context-extension.stages"]),
        ({"order": ["pretrain"]}, ["order", "tokenizer is missing"]),
        ({"rl-40k.windows": [80, 40]}, ["rl-40k", "must rise"]),
        ({"rl-80k.advance": None}, ["rl-80k", "advance"]),
        ({"rl-40k.updates_per_step": 7}, ["rl-40k", "multiple of updates_per_step=7"]),
    ],
)
def test_a_fault_is_one_line_that_names_field_value_and_what_is_allowed(
    overrides: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        profile.load("tiny", overrides=overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        profile.load("tiny", overrides={"model.hidden_size": "x", "sft.epochs": -1.0})
    assert "model.hidden_size" in str(caught.value) and "sft.epochs" in str(caught.value)


def test_a_missing_profile_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match="tiny"):
        profile.load("huge")


def test_a_file_that_is_not_yaml_or_not_a_mapping(tmp_path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("model: [")
    with pytest.raises(UsageError, match="not valid YAML"):
        profile.load(str(file))
    file.write_text("- 1")
    with pytest.raises(UsageError, match="mapping"):
        profile.load(str(file))


def test_steps_in_length_below_two_are_refused() -> None:
    content = yaml.safe_load((paths.PROFILES / "tiny.yaml").read_text())
    content["context-extension"]["stages"][1]["sequence_length"] = 700
    with pytest.raises(UsageError, match="less than twice"):
        profile.parse(content, "test")


def _order(first: str, second: str) -> list[str]:
    order = [s for s in profile.load("tiny").order if s not in (first, second)]
    at = order.index("pretrain") + 1
    return [*order[:at], first, second, *order[at:]]


@pytest.mark.parametrize("pair", [("sft", "context-extension"), ("context-extension", "sft")])
def test_both_orders_work_and_set_the_parents(pair: tuple[str, str]) -> None:
    settings = profile.load("tiny", overrides={"order": _order(*pair)})
    assert parent_of(settings, pair[0]) == "pretrain"
    assert parent_of(settings, pair[1]) == pair[0]
    assert parent_of(settings, "rl-40k") == pair[1]
    assert parent_of(settings, "pretrain") is None


def test_reading_before_making_is_refused() -> None:
    order = profile.load("tiny").order
    order = ["sft", *[stage for stage in order if stage != "sft"]]
    with pytest.raises(UsageError, match="sft reads tokenizer, which must come before it"):
        profile.load("tiny", overrides={"order": order})


def test_a_resolved_profile_reads_back_as_itself() -> None:
    settings = profile.load("tiny")
    assert profile.parse(settings.to_dict(), "again") == settings


@given(
    decay=st.sampled_from(["linear", "cosine", "exponential", "none"]),
    warmup=st.floats(0, 0.5),
    constant=st.floats(0, 0.5),
    steps=st.integers(1, 500),
)
def test_learning_rate_stays_between_its_bounds_and_never_rises_after_warmup(
    decay: str, warmup: float, constant: float, steps: int
) -> None:
    rate = LearningRate(max=1.0, min=0.1, warmup_fraction=warmup, constant_fraction=constant, decay=decay)  # type: ignore[arg-type]
    values = [rate.at(step, steps) for step in range(steps)]
    after = values[math.ceil(warmup * steps) :]
    assert all(0 < value <= 1.0 for value in values)
    assert all(value >= 0.1 - 1e-12 for value in after)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    if decay != "none" and warmup + constant < 0.9 and steps > 20:
        assert values[-1] == pytest.approx(0.1)


def test_the_papers_pretraining_schedule() -> None:
    """8e-5 for 2.5T of 7.5T tokens, 8e-6 at the end (MiniMax-M1 report §2.1)."""
    pretrain = profile.load("m1-456b").pretrain
    tokens_per_step = pretrain.sequence_length * pretrain.global_batch_size
    assert pretrain.train_steps * tokens_per_step == pytest.approx(7.5e12, rel=1e-3)
    at = pretrain.learning_rate.at
    assert at(int(2.49e12 / tokens_per_step), pretrain.train_steps) == 8e-5
    assert at(int(2.6e12 / tokens_per_step), pretrain.train_steps) < 8e-5
    assert at(pretrain.train_steps - 1, pretrain.train_steps) == pytest.approx(8e-6)
