"""The bench prints the agreed record, and refuses to time a kernel that is wrong."""

import json

import pytest
import torch

from kernels import bench


def test_records_hold_the_agreed_fields(capsys, monkeypatch):
    monkeypatch.setattr(bench, "REPEATS", 2)
    log = bench.Log()
    bench.compare(bench.Case(64, torch.float32, True, "cpu", heads=2), log)
    bench.decode(torch.float32, "cpu", log)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {r["peer_name"] for r in records} >= {"sdpa", "transformers", "torch operations"}
    for record in records:
        assert list(record) == ["case", "metric", "unit", "ours", "peer", "peer_name", "ratio", "spread"]
        low, high = record["spread"]
        assert low <= record["ratio"] <= high


def test_ratio_is_the_median_of_pairs(capsys):
    bench.Log().add("c", "time", "ms", [1.0, 2.0, 4.0], [8.0, 2.0, 8.0], "peer")
    record = json.loads(capsys.readouterr().out)
    assert (record["ours"], record["peer"], record["ratio"], record["spread"]) == (2.0, 8.0, 2.0, [1.0, 8.0])


def test_both_contenders_compute_the_same():
    case = bench.Case(40, torch.float32, False, "cpu", heads=2)
    q, k, v = (torch.randn(1, 2, 40, bench.HEAD_DIM) for _ in range(3))
    fused = torch.cat([q, k, v], dim=-1).transpose(1, 2).flatten(2)
    contenders = bench._contenders(case, (q, k, v, torch.randn_like(q)), fused)
    ours, theirs = contenders["ours"][0](), contenders["transformers"][0]()
    # The stand-in for the gate is sigmoid(0) = 1/2.
    torch.testing.assert_close(ours.transpose(1, 2).flatten(2) / 2, theirs, rtol=1e-3, atol=1e-3)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    right = bench.lightning_attention
    monkeypatch.setattr(bench, "lightning_attention", lambda *a, **b: right(*a, **b) * 1.001)
    with pytest.raises(SystemExit, match="no benchmark"):
        bench.check("cpu")
