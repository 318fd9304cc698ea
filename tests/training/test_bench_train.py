"""The training bench does the same work on both sides and reports it."""

from __future__ import annotations

import json

import pytest
import torch

from m1.errors import UsageError
from m1.run import profiles as profile
from m1.training import bench
from m1.training.bench_worker import draw

#: As small as the layers allow: what is proven is that both sides run, agree and report.
SMALL = {
    "model.num_layers": 2,
    "model.softmax_every": 2,
    "model.hidden_size": 32,
    "model.num_attention_heads": 2,
    "model.num_query_groups": 1,
    "model.head_dim": 16,
    "model.moe_ffn_hidden_size": 24,
    "model.vocab_size": 300,
}


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setattr(bench, "TOKENS", 256)
    return profile.load("tiny", overrides=SMALL)


def test_both_sides_run_and_report(settings):
    records, lines = [], []
    bench.bench(settings, lengths=[64], quick=True, say=lines.append, write=records.append)
    speed, *parts = records
    assert speed["metric"] == "training speed" and speed["ours"] > 0 and speed["peer"] > 0
    assert speed["peer_name"].startswith("transformers, ")
    low, high = speed["spread"]
    assert low <= speed["ratio"] <= high
    names = {record["metric"].removeprefix("part of a step: ") for record in parts}
    assert {"lightning attention", "softmax attention", "MoE experts", "head", "optimizer", "data"} <= names
    assert {"forward", "backward"} <= names
    assert all(list(record) == list(speed) for record in parts)
    json.dumps(records)
    first = next(line for line in lines if "first loss" in line)
    ours, peer = (float(word.rstrip(",")) for word in first.replace(",", " ").split() if word[0].isdigit())
    assert ours == pytest.approx(peer, abs=1e-4)


def test_bad_lengths_and_too_few_cores_are_refused(settings, monkeypatch):
    with pytest.raises(UsageError, match="length 8192 exceeds"):
        bench.bench(settings, lengths=[8192])
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda pid: {0})
    with pytest.raises(UsageError, match="uses 2 cores, and 1"):
        bench.bench(settings, lengths=[64])


def test_ratio_is_the_median_of_rounds():
    pairs = [(1.0, 2.0), (2.0, 2.0), (1.0, 8.0)]
    record = bench.report("c", 100, pairs, "peer", lambda text: None, lambda record: None)
    assert (record["ours"], record["peer"]) == (100.0, 50.0)
    assert (record["ratio"], record["spread"]) == (2.0, [1.0, 8.0])


def test_ranks_share_one_batch():
    task = bench.Task("ours", {"vocab_size": 50}, {}, "fp32", 8, 4, 7, "", [0], {})
    whole = draw(task, bench.Way(1, 2), 0, 3)
    halves = [draw(task, bench.Way(2, 1), rank, 3) for rank in range(2)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, draw(task, bench.Way(1, 2), 0, 4))
