"""The report of a whole run, as a browser shows it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import whole_run
import yaml
from PIL import Image
from playwright.sync_api import Locator
from visits import Browser, Visit

from m1 import figures, paths
from m1.config.profile import Profile
from m1.planning.work import Cost
from m1.run.registry import data_stages
from m1.tracking import report

#: The smallest height of any text, in CSS pixels.
SMALLEST = 12.0
POINTS_PER_INCH = 72
SIZES = [(1280, 900), (1920, 1080), (1100, 800), (900, 800), (400, 800)]


@dataclass(frozen=True)
class Written:
    """A report and the run folders that it is about."""

    page: Path
    root: Path
    settings: Profile

    @property
    def results(self) -> dict[str, dict]:
        """stage -> what stands in its result.json."""
        found = (json.loads(file.read_text()) for file in self.page.parent.glob("*/*/result.json"))
        return {result["stage"]: result for result in found}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    root = tmp_path_factory.mktemp("checkout")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "ROOT", root)
        settings, _ = whole_run.make(root, "made-up")
        planned = {"pretrain": Cost(500_000, 7.2e12, bound=True, steps=100)}
        yield Written(report(settings, lambda _: planned), root, settings)


@pytest.fixture(scope="module")
def visit(browser: Browser, written: Written) -> Iterator[Visit]:
    """The page in a desktop window, which its tests share and leave as they find it."""
    with browser.visit(written.page.as_uri()) as opened:
        yield opened


def numbers(place: Locator) -> list[float]:
    """The exact numbers in a place; what is shown must be them, rounded to the digits that are shown."""
    found = []
    for data in place.locator("data").all():
        exact, shown = float(data.get_attribute("value") or "nan"), data.inner_text()
        text = shown.replace(",", "")
        per_cent = text.endswith("%")
        digits, _, exponent = text.rstrip("%").partition("e")
        decimals = len(digits.partition(".")[2])
        unit = 10.0 ** (int(exponent or 0) - decimals)
        value = float(text.rstrip("%"))
        assert abs(value - exact * (100 if per_cent else 1)) <= 0.5001 * unit, f"{shown} for {exact}"
        found.append(exact)
    return found


def section_of(visit: Visit, stage: str) -> Locator:
    return visit.page.locator(f"section[aria-labelledby='stage-{stage}']")


def test_opens_without_errors_and_asks_for_nothing_else(visit, written):
    assert visit.errors == [] and visit.failed == []
    outside = [address for address in visit.requested if not address.startswith("data:")]
    assert outside == [written.page.as_uri()]
    assert visit.page.title() == "m1 report: made-up"


def test_overview_shows_the_numbers_of_the_results(visit, written):
    rows = visit.page.locator("#overview + table tbody tr")
    assert rows.count() == len(written.settings.order)
    for name, row in zip(written.settings.order, rows.all(), strict=True):
        assert name in row.locator("th").inner_text()
        if name in data_stages():
            assert "data set" in row.inner_text()
            continue
        result = written.results[name]
        assert result["key_metric"] in row.inner_text()
        before_and_after = [value for value in (result["before"], result["after"]) if value is not None]
        assert numbers(row)[: len(before_and_after)] == before_and_after


def test_sections_show_every_final_metric_and_note(visit, written):
    for name, result in written.results.items():
        section = section_of(visit, name)
        folded = section.locator("details", has=visit.page.locator(".metrics"))
        assert not folded.locator(".metrics").is_visible()
        folded.locator("summary").click()
        names = folded.locator(".metrics dt").all_inner_texts()
        assert dict(zip(names, numbers(folded.locator(".metrics")), strict=True)) == result["metrics"]
        folded.locator("summary").click()
        told = section.inner_text()
        for sentence in (*result["notes"], *result["left_out"], result["fingerprint"]):
            assert told.count(sentence) == 1, sentence


def test_accuracy_table_and_flow_hold_the_evaluated_rates(visit, written):
    metrics = written.results["evaluate"]["metrics"]
    table = visit.page.locator("table.accuracy")
    assert table.locator("thead th").all_inner_texts() == ["task", *whole_run.SOLVED]
    for row in table.locator("tbody tr").all():
        task = row.locator("th").inner_text().replace(" ", "_")
        assert numbers(row) == [metrics[f"pass@1/{name}/{task}"] for name in whole_run.SOLVED]
    assert visit.page.locator(".flow .name a").all_inner_texts() == written.settings.order


def test_plan_beside_what_was_logged(visit):
    row = visit.page.locator("table.plan tbody tr").first
    assert "≤" in row.inner_text() and "82%" in row.inner_text()
    steps, last, planned, tokens = numbers(row)[:4]
    assert (steps, last, planned, tokens) == (100, 99, 500_000, 409_600)


def test_what_was_left_out_is_said_first_and_where_it_belongs(visit):
    notice = visit.page.get_by_role("complementary", name="Left out")
    assert notice.is_visible() and whole_run.NO_ENGINE in notice.inner_text()
    assert notice.bounding_box()["y"] < visit.page.locator("#flow").bounding_box()["y"]
    assert notice.locator("a").all_inner_texts() == ["synthesize", "rl-40k", "evaluate"]
    for stage in ("synthesize", "rl-40k", "evaluate"):
        assert section_of(visit, stage).locator(".notice").is_visible()
    assert visit.page.locator(".flow .badge").count() == 3


def test_sources_and_licences(visit):
    details = section_of(visit, "corpus").locator("details", has=visit.page.locator(".sources"))
    assert "6 raw sources" in details.inner_text() and "(Apache-2.0, BSD-3-Clause, MIT)" in details.inner_text()
    details.locator("summary").click()
    assert details.locator("tbody tr").count() == 6
    assert re.search(r"package-5\s+1\.5\.0\s+Apache-2\.0.*[0-9a-f]{64}", details.inner_text(), re.DOTALL)
    details.locator("summary").click()


def test_contents_lead_to_every_heading(visit):
    links = visit.page.locator("nav.contents a").all()
    targets = [link.get_attribute("href") for link in links]
    headings = visit.page.locator("main > h2, .stages h3").all()
    assert targets == [f"#{heading.get_attribute('id')}" for heading in headings]
    for link, heading in zip(links, headings, strict=True):
        link.click()
        assert heading.is_visible()
        assert re.sub(r"^\d+", "", heading.inner_text()).strip() == link.inner_text()
        box = heading.bounding_box()
        assert 0 <= box["y"] < 900 - box["height"], link.inner_text()
        assert link.is_visible() and link.bounding_box()["y"] >= 0  # the contents stay where they are
    visit.page.evaluate("window.scrollTo(0, 0)")
    every = visit.page.eval_on_selector_all("a", "links => links.map(link => link.getAttribute('href'))")
    ids = visit.page.eval_on_selector_all("[id]", "marked => marked.map(element => element.id)")
    assert len(ids) == len(set(ids))
    assert {target.removeprefix("#") for target in every} <= set(ids)


def test_no_panel_is_empty_and_every_image_is_whole(visit):
    empty = visit.page.eval_on_selector_all(
        "section, aside, details, table, tbody, tr, ul, ol, dl, li, dt, p, h1, h2, h3, h4, figure, .figures, .scroll",
        "all => all.filter(e => !e.textContent.trim() && !e.querySelector('img')).map(e => e.outerHTML.slice(0, 200))",
    )
    assert empty == []
    images = visit.page.locator("img").all()
    assert len(images) > 20
    for image in images:
        assert image.evaluate("image => image.complete && image.naturalWidth > 0 && image.naturalHeight > 0")
        assert len(image.get_attribute("alt") or "") > 20
    described = [image.get_attribute("alt") or "" for image in images]
    assert any(
        text.startswith("Language-model loss, stage after stage. pretrain. training: from 7.") for text in described
    )
    assert len(set(described)) == len(described)


def test_text_of_figures_is_legible(visit):
    for image in visit.page.locator("figure img").all():
        content = base64.b64decode(image.get_attribute("src").partition(",")[2])
        with Image.open(io.BytesIO(content)) as opened:
            natural, dots_per_inch = opened.width, opened.info["dpi"][0]
        scale = image.bounding_box()["width"] / natural
        height = figures.SMALLEST_TEXT / POINTS_PER_INCH * dots_per_inch * scale
        assert height >= SMALLEST, f"{image.get_attribute('alt')}: text is {height:.1f} px high"


def test_text_of_the_page_is_legible(visit):
    sizes = visit.page.evaluate(
        """() => {
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
            while (walker.nextNode()) {
                const text = walker.currentNode.textContent.trim();
                if (text) found.push([parseFloat(getComputedStyle(walker.currentNode.parentElement).fontSize), text]);
            }
            return found;
        }"""
    )
    assert len(sizes) > 300
    assert [entry for entry in sizes if entry[0] < SMALLEST] == []


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_fits_every_window(browser, written, width, height):
    with browser.visit(written.page.as_uri(), width, height) as opened:
        page = opened.page
        page.eval_on_selector_all("details", "all => all.forEach(details => details.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        contents, title = page.locator("nav.contents").bounding_box(), page.locator("h1").bounding_box()
        if width >= 1024:
            assert contents["x"] + contents["width"] <= title["x"]  # at the side
        else:
            assert contents["y"] + contents["height"] <= title["y"]  # on top
        # What does not fit scrolls within a box of its own, and nothing is cut off outside one.
        cut = page.eval_on_selector_all(
            "main *",
            """(all, width) => all
                .filter(e => !e.closest('.scroll, figure') && e.getBoundingClientRect().right > width + 1)
                .map(e => e.outerHTML.slice(0, 200))""",
            width,
        )
        assert cut == []
        assert opened.errors == [] and opened.failed == []


def test_prints_with_everything_unfolded(browser, written):
    with browser.visit(written.page.as_uri()) as opened:
        assert not opened.page.locator(".metrics").first.is_visible()
        opened.page.emulate_media(media="print")
        assert opened.page.locator("nav.contents").evaluate("nav => getComputedStyle(nav).position") == "static"
        heights = opened.page.eval_on_selector_all(".metrics, .sources", "all => all.map(e => e.clientHeight)")
        assert len(heights) > 5 and min(heights) > 0
        pages = opened.page.pdf(prefer_css_page_size=True).count(b"/Type /Page\n")
        assert 5 <= pages <= 40


def test_results_of_different_runs_are_pointed_out(browser, written):
    """The tokens were made anew; what read the old ones was not."""
    lock, content, page = written.root / "dvc.lock", (written.root / "dvc.lock").read_text(), written.page.read_text()
    digest = yaml.safe_load(content)["stages"]["tokens@made-up"]["outs"][0]["md5"]
    try:
        lock.write_text(content.replace(digest, "0" * 32 + ".dir"))
        with browser.visit(report(written.settings).as_uri()) as opened:
            notice = opened.page.get_by_role("complementary", name="Mixed runs")
            assert notice.is_visible()
            readers = "pretrain, sft, context-extension and export"
            assert f"The newest {readers} read an earlier tokens data set ({digest[:12]})" in notice.inner_text()
    finally:
        lock.write_text(content)
        written.page.write_text(page)
