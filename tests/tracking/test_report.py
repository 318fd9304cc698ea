"""Report and figures, without any server."""

from __future__ import annotations

import base64
import math
import re

import pytest
from PIL import Image

from m1 import figures
from m1.errors import UsageError
from m1.run.contract import StageContext
from m1.tracking import report


@pytest.fixture
def finished(house):
    """pretrain, sft and one RL stage on top, with the metrics that stages log."""
    parent = None
    for name in ("pretrain", "sft", "context-extension", "rl-40k", "evaluate"):
        request = house.request(name, parent)
        context = StageContext(request)
        for step in range(8):
            metrics = {"train/loss": 5 - step / 8, "train/grad_norm": 1.0 + step}
            if name == "rl-40k":
                metrics = {"rl/reward": step / 8, "rl/response_length": 40.0 + step, "train/grad_norm": 1.0}
            context.log_metrics(step, metrics)
        accuracies = {f"{when}/pass@1/arithmetic": value for when, value in (("sft", 0.2), ("rl-40k", 0.6))}
        result = house.finish(request, metrics=accuracies if name == "evaluate" else {"tokens": 4096.0})
        parent = result if name != "evaluate" else parent
    return house


def test_page(finished):
    page = report(finished.profile, lambda settings: {"pretrain": {"tokens": 5000, "flops": 1.5e12}})
    assert page == finished.root / "runs" / finished.profile.name / "report.html"
    text = page.read_text()
    assert "href" not in text and text.count("src=") == text.count('src="data:image/png;base64,')  # nothing outside
    assert "@import" not in text and "url(" not in text
    for expected in (
        "pretrain",
        "held-out loss",
        "4,096",
        "5,000",
        "1.50e+12",
        "a note",
        "MIT",
        "not done yet",
        "CISPO",
    ):
        assert expected in text
    images = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]+)">', text)
    names = {name for name, _ in images}
    assert {"the stages in order", "loss", "gradient-norm", "reward", "response-length", "accuracy by task"} <= names
    assert all(base64.b64decode(content).startswith(b"\x89PNG") for _, content in images)
    for tag in ("table", "tr", "div", "details", "h2", "ul"):
        assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"</{tag}>")


def test_text_of_a_run_cannot_break_the_page(house):
    request = house.request("pretrain")
    StageContext(request).finish(
        checkpoint=None, key_metric="<b>&", before=None, after=None, metrics={"<script>": 1.0}, notes=["a < b"]
    )
    text = report(house.profile).read_text()
    assert "<script>" not in text and "<b>&<" not in text
    assert "a &lt; b" in text


def test_older_parent_is_pointed_out(finished):
    finished.make_data("tokens", version=2)
    finished.finish(finished.request("pretrain"))
    assert "The newest sft started from an earlier pretrain run" in report(finished.profile).read_text()


def test_nothing_to_report(house):
    (house.root / "dvc.lock").unlink()
    with pytest.raises(UsageError, match="no finished stage"):
        report(house.profile)
    with pytest.raises(UsageError, match="no-such-profile"):
        report("no-such-profile")


@pytest.mark.parametrize("values", [[1.0, 2.0], [math.nan, 1.0], [math.inf, -1.0], [math.nan, math.nan], []])
def test_figures_take_any_values(tmp_path, values):
    steps = list(range(len(values)))
    drawn = [
        figures.curve(tmp_path / "curve.png", {"a": (steps, values)}, "A", "step", "value"),
        figures.curve(tmp_path / "log.png", {"a": (steps, values)}, "A", "step", "value", log=True),
        figures.position_curve(tmp_path / "position.png", {"a": (steps, values)}, trained_length=2),
        figures.bars_by_group(tmp_path / "bars.png", [str(s) for s in steps], {"a": values, "b": values}, "A", "value"),
        figures.scatter(tmp_path / "scatter.png", values, values),
    ]
    for file in drawn:
        with Image.open(file) as image:
            image.load()
            assert min(image.size) > 300
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in drawn}  # no half-written file stays


def test_figures_leave_no_global_state(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.curve(tmp_path / "a.png", {"a": ([0, 1], [1.0, 2.0])}, "A", "step", "value")
    assert dict(matplotlib.rcParams) == before


def test_figures_refuse_unequal_lengths(tmp_path):
    with pytest.raises(ValueError, match="2 steps and 1 values"):
        figures.curve(tmp_path / "a.png", {"a": ([0, 1], [1.0])}, "A", "step", "value")
    with pytest.raises(ValueError, match="1 values for 2 groups"):
        figures.bars_by_group(tmp_path / "a.png", ["x", "y"], {"a": [1.0]}, "A", "value")
    with pytest.raises(ValueError, match="same length"):
        figures.scatter(tmp_path / "a.png", [1.0, 2.0], [1.0])
    assert not list(tmp_path.iterdir())
