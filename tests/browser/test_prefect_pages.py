"""Prefect's pages of the same two flow runs."""

from __future__ import annotations

import httpx
from conftest import CAUSE, Runs
from light import KEY, NO_ENGINE
from playwright.sync_api import expect
from visits import Browser, Visit

#: An icon that Prefect 3.8's own page asks for by a name it has not set.
NO_ICON = "/ico/undefined.svg"
SECONDS = 20_000


def check(visit: Visit) -> None:
    assert [line for line in visit.failed if NO_ICON not in line] == []
    assert [text for text in visit.errors if "status of 404" not in text] == []


def test_finished_run_shows_its_stages(browser: Browser, runs: Runs) -> None:
    with browser.visit(f"{runs.prefect}/runs/flow-run/{runs.finished}") as visit:
        page = visit.page
        expect(page.get_by_text("Completed", exact=True).first).to_be_visible(timeout=SECONDS)
        expect(page.get_by_text(f"{len(runs.order)} Task runs")).to_be_visible(timeout=SECONDS)
        page.get_by_text("Artifacts", exact=True).first.click()
        expect(page.get_by_text("What each stage did").first).to_be_visible(timeout=SECONDS)
        check(visit)


def test_summary_of_the_finished_run_tells_what_each_stage_did(browser: Browser, runs: Runs) -> None:
    """Opened by its address: Prefect's drawing of the run complains where its page is left while it draws."""
    wanted = {"artifacts": {"key": {"any_": ["summary"]}, "flow_run_id": {"any_": [runs.finished]}}}
    answer = httpx.post(f"{runs.prefect}/api/artifacts/filter", json=wanted, timeout=60, trust_env=False)
    (artifact,) = answer.json()
    with browser.visit(f"{runs.prefect}/artifacts/artifact/{artifact['id']}") as visit:
        page = visit.page
        for stage, (metric, _, after) in KEY.items():
            row = page.locator("tr", has=page.get_by_text(stage, exact=True)).first
            expect(row).to_contain_text(metric, timeout=SECONDS)
            expect(row).to_contain_text(f"{after:.4g}")
        expect(page.get_by_text(NO_ENGINE).first).to_be_visible()
        check(visit)


def test_failed_run_shows_why(browser: Browser, runs: Runs) -> None:
    with browser.visit(f"{runs.prefect}/runs/flow-run/{runs.failed}") as visit:
        page = visit.page
        expect(page.get_by_text("Failed", exact=True).first).to_be_visible(timeout=SECONDS)
        expect(page.get_by_text(CAUSE).first).to_be_attached(timeout=SECONDS)
        check(visit)
