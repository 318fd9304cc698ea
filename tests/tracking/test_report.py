"""Report and figures, without any server."""

from __future__ import annotations

import base64
import math
import re

import pytest
from PIL import Image

from m1 import figures
from m1.errors import UsageError
from m1.files import write_json
from m1.planning.work import Cost
from m1.run.contract import StageContext
from m1.tracking import report, report_words
from m1.tracking.pictures import embedded


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
    page = report(finished.profile, lambda settings: {"pretrain": Cost(5000, 1.5e12)})
    assert page == finished.root / "runs" / finished.profile.name / "report.html"
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    # Nothing outside: links lead into the page, images and the icon are in it.
    assert all(target.startswith("#") or target == "data:," for target in re.findall(r'href="([^"]*)"', text))
    assert text.count("src=") == text.count('src="data:image/png;base64,') and "<script" not in text
    assert "@import" not in text and "url(" not in text
    for expected in (
        "pretrain",
        "held-out loss",
        "4,096",
        "5,000",
        "1.50e12",
        "a note",
        "MIT",
        "not done yet",
        "CISPO",
    ):
        assert expected in text
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]*)"', text)
    assert all(base64.b64decode(content).startswith(b"\x89PNG") for content, _ in images)
    # The stages' own figures are described by their names, those of the report by what they show.
    described = " ".join(description for _, description in images)
    for expected in ("pretrain: loss", "training: from 5 to 4.125", "Gradient norm", "rl-40k. from 0 to 0.875"):
        assert expected in described
    assert '<data value="0.6">0.60</data>' in text  # accuracy of one task after reinforcement learning
    for tag in ("table", "tr", "div", "details", "h2", "ul", "section", "figure", "aside", "dl"):
        assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"</{tag}>")


def test_text_of_a_run_cannot_break_the_page(house):
    request = house.request("pretrain")
    hostile = "<script>alert('a')</script>"
    StageContext(request).finish(
        checkpoint=None,
        key_metric=f"<b>&{hostile}",
        before=None,
        after=None,
        metrics={hostile: 1.0},
        notes=["a < b", hostile],
        left_out=[hostile],
    )
    text = report(house.profile).read_text()
    assert "<script" not in text and "<b>&<" not in text
    assert "a &lt; b" in text and text.count("&lt;script&gt;alert(&#39;a&#39;)") >= 4


def test_older_parent_and_older_data_are_pointed_out(finished):
    finished.make_data("tokens", version=2)
    finished.finish(finished.request("pretrain"))
    text = report(finished.profile).read_text()
    assert "The newest sft started from an earlier pretrain run" in text
    assert "The newest sft and context-extension read an earlier tokens data set" in text


def test_nothing_is_pointed_out_where_nothing_was_mixed_or_left_out(finished):
    text = report(finished.profile).read_text()
    assert "an earlier" not in text and 'class="notice"' not in text and 'class="badge"' not in text


def test_left_out_parts_are_shown_once_with_the_stage_and_once_above(house):
    context = StageContext(house.request("pretrain"))
    said = "half of it was left out"
    context.finish(
        checkpoint=None, key_metric="loss", before=2.0, after=1.0, metrics={}, notes=[said, "a note"], left_out=[said]
    )
    summary = house.root / f"data/{house.profile.name}/synthesize/summary.json"
    write_json(summary, {"rows": 3, "notes": [said], "left_out": [said]})
    text = report(house.profile).read_text()
    assert text.count(said) == 3 and text.count("partly done") == 4  # boxes and rows of both stages
    assert text.count("a note") == 1


def test_figure_that_is_gone_or_damaged_is_named(finished):
    folder = next((finished.root / "runs" / finished.profile.name / "sft").glob("*"))
    (folder / "figures" / "loss.png").write_bytes(b"no image")
    assert "Figures that cannot be read: loss.png." in report(finished.profile).read_text()
    (folder / "figures" / "loss.png").unlink()
    assert "Figures that cannot be read: loss.png." in report(finished.profile).read_text()


def test_wide_figures_take_both_columns(tmp_path):
    for width, wide in ((figures.HALF, False), (figures.WIDE, True)):
        with figures.canvas(tmp_path / "a.png", width) as (figure, axes):
            axes.plot([0, 1])
            figure.set_label("what it shows")
        shown = embedded(tmp_path / "a.png", "sft")
        assert shown is not None and shown.wide is wide and shown.description == "sft: what it shows"
        assert shown.width == round(width * figures.DOTS_PER_INCH)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([7.678432, 5.0651], ["7.678", "5.065"]),
        ([0.0, 0.461806], ["0", "0.4618"]),
        ([None, 1.907349e-05], [None, "1.907e-5"]),
        ([535.36, 2.0], ["535.4", "2.0"]),
        ([488448.0, 1234.0], ["488,448", "1,234"]),
        ([1.0], ["1"]),
        ([math.nan, -math.inf], ["nan", "-inf"]),
        ([-0.96875, 9.5e-5], ["-0.9688", "0.0001"]),
    ],
)
def test_numbers_that_are_compared_have_the_same_decimals(values, shown):
    assert [None if value is None else value.shown for value in report_words.numbers(values)] == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds, shown):
    assert report_words.duration(seconds) == shown


def test_nothing_to_report(house):
    (house.root / "dvc.lock").unlink()
    with pytest.raises(UsageError, match="no finished stage"):
        report(house.profile)
    with pytest.raises(UsageError, match="no-such-profile"):
        report("no-such-profile")


def _every_figure(folder, steps, values):
    """One of every kind, small and large."""
    one, many = {"a": (steps, values)}, {f"layer {i}": (steps, values) for i in range(12)}
    groups = [f"a_task_of_some_{step}" for step in steps]
    return [
        figures.curve(folder / "curve.png", one, "A", "step", "value"),
        figures.curve(folder / "many.png", many, "A", "step", "value"),
        figures.curve(folder / "log.png", one, "A", "step", "value", log=True),
        figures.panels(folder / "panels.png", {"x": one, "y": {**one, "b": (steps, values)}}, "A", "step", "value"),
        figures.panels(folder / "wide.png", {name: one for name in "xyz"}, "A", "step", "value", log=True),
        figures.position_curve(folder / "position.png", one, trained_length=2),
        figures.bars_by_group(folder / "bars.png", groups, {"a": values, "b": values}, "A", "value"),
        figures.bars_by_group(folder / "more.png", groups * 9, {"a": values * 9}, "A", "value", limit=None),
        figures.scatter(folder / "scatter.png", values, values),
    ]


@pytest.mark.parametrize("values", [[1.0, 2.0], [math.nan, 1.0], [math.inf, -1.0], [math.nan, math.nan], []])
def test_figures_take_any_values(tmp_path, values):
    steps = list(range(len(values)))
    drawn = _every_figure(tmp_path, steps, values)
    for file in drawn:
        with Image.open(file) as image:
            image.load()
            assert min(image.size) > 300
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in drawn}  # no half-written file stays


@pytest.mark.parametrize("values", [[1.0, 200.0], [math.nan, 1e-9], [0.5] * 12, []])
def test_no_text_of_a_figure_is_smaller_than_announced(tmp_path, monkeypatch, values):
    """The page relies on it: figures.SMALLEST_TEXT is legible at the width at which it shows a figure."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    sizes = []
    save = Figure.savefig

    def measured(figure, *arguments, **settings):
        save(figure, *arguments, **settings)  # ticks get their labels only now
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
        assert not [text.get_text() for text in texts if "$" in text.get_text()]  # superscripts would be smaller
        sizes.append(min(text.get_fontsize() for text in texts))

    monkeypatch.setattr(Figure, "savefig", measured)
    drawn = _every_figure(tmp_path, list(range(len(values))), values)
    assert len(sizes) == len(drawn) and min(sizes) >= figures.SMALLEST_TEXT


def test_figures_are_described_in_their_files(tmp_path):
    def said(file):
        with Image.open(file) as image:
            return image.info["Description"]

    lines = {"training": ([0, 1, 2], [3.0, math.nan, 1.23456]), "held-out": ([0], [math.nan])}
    file = figures.curve(tmp_path / "a.png", lines, "Loss of α", "step", "nats")
    assert said(file) == "Loss of α. training: from 3 to 1.235; held-out: no finite values."
    file = figures.bars_by_group(tmp_path / "b.png", ["x", "y"], {"before": [0.25, 1.0]}, "Accuracy", "share")
    assert said(file) == "Accuracy. before: x 0.25, y 1."
    file = figures.scatter(tmp_path / "c.png", [0.0, 1.0, math.nan], [0.0, 1.0, 1.0])
    assert "2 pairs, correlation 1.00000" in said(file) and "1 pairs not finite" in said(file)


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
