"""MLflow's pages after two flow runs, as a browser shows them to someone who opens them for the first time."""

from __future__ import annotations

import re

import pytest
from conftest import CAUSE, PROFILE, Runs
from light import KEY, SOLVED
from mlflow import MlflowClient
from mlflow.entities import Run
from playwright.sync_api import Page, expect
from visits import Browser, Visit

#: Answered with 404 by any MLflow 3.17 server without accounts.
NO_ACCOUNTS = "/ajax-api/2.0/mlflow/users/current"
#: What Chromium says when a table is laid out once more; nothing is wrong then.
RESIZED = "ResizeObserver loop completed"
SECONDS = 20_000  #: how long a part of a page may take to show, in milliseconds


def check(visit: Visit) -> None:
    """Nothing failed while the page was open."""
    assert [line for line in visit.failed if NO_ACCOUNTS not in line] == []
    unknown = [text for text in visit.errors if RESIZED not in text and "status of 404" not in text]
    assert unknown == []


@pytest.fixture(scope="module")
def client(runs: Runs) -> MlflowClient:
    return MlflowClient(runs.mlflow)


@pytest.fixture(scope="module")
def experiment(client: MlflowClient) -> str:
    found = client.get_experiment_by_name(f"m1-{PROFILE}")
    assert found is not None
    return found.experiment_id


@pytest.fixture(scope="module")
def flow_runs(client: MlflowClient, experiment: str) -> tuple[Run, Run]:
    """(the run that finished, the run that failed)."""
    failed, finished = client.search_runs([experiment], "tags.level = 'flow run'")
    return finished, failed


def stage_run(client: MlflowClient, flow: Run, stage: str) -> Run:
    wanted = f"tags.`mlflow.parentRunId` = '{flow.info.run_id}' and tags.stage = '{stage}'"
    (found,) = client.search_runs([flow.info.experiment_id], wanted)
    return found


def address(runs: Runs, run: Run) -> str:
    return f"{runs.mlflow}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def whole_description(page: Page) -> str:
    """Text of a run's description, unfolded if it is folded."""
    expect(page.get_by_text("About this run")).to_be_visible(timeout=SECONDS)
    more = page.get_by_text("Show more")
    if more.count():
        more.first.click()
    return page.locator("main").first.inner_text()


def test_first_visit_opens_as_training_and_without_an_assistant(browser: Browser, runs: Runs, experiment: str) -> None:
    with browser.visit(f"{runs.mlflow}/") as visit:
        page = visit.page
        page.get_by_role("link", name=f"m1-{PROFILE}").click(timeout=SECONDS)
        expect(page.get_by_role("heading", name="Runs")).to_be_visible(timeout=SECONDS)
        assert f"/experiments/{experiment}/runs" in page.url
        expect(page.get_by_role("link", name=re.compile(f"^m1-{PROFILE}-"))).to_have_count(3, timeout=SECONDS)
        for word in ("Overview", "Evaluation runs", "Judges", "Set up Assistant"):
            assert page.get_by_text(word, exact=True).count() == 0
        check(visit)


def test_what_a_person_chooses_stays(browser: Browser, runs: Runs) -> None:
    with browser.visit(f"{runs.mlflow}/") as visit:
        page = visit.page
        page.get_by_text("GenAI", exact=True).click(timeout=SECONDS)
        stored = "localStorage.getItem('mlflow.workflowType_v1')"
        page.wait_for_function(f"{stored} === '\"genai\"'", timeout=SECONDS)
        page.reload()
        assert page.evaluate(stored) == '"genai"'


def test_experiment_tells_what_it_is_and_how_its_newest_run_ended(
    browser: Browser, runs: Runs, experiment: str, flow_runs: tuple[Run, Run]
) -> None:
    with browser.visit(f"{runs.mlflow}/#/experiments/{experiment}") as visit:
        page = visit.page
        newest = page.get_by_text("Newest flow run:").first
        expect(newest).to_contain_text("Failed at rl-40k", timeout=SECONDS)
        expect(newest).to_contain_text(flow_runs[1].info.run_name or "")
        for run in flow_runs:
            expect(page.get_by_role("link", name=run.info.run_name).first).to_be_visible(timeout=SECONDS)
        check(visit)


def test_prepared_table_sets_results_side_by_side(browser: Browser, runs: Runs, experiment: str) -> None:
    with browser.visit(f"{runs.mlflow}/#/experiments/{experiment}", width=2200) as visit:
        with visit.page.context.expect_page() as opened:
            visit.page.get_by_role("link", name="flow runs side by side").first.click(timeout=SECONDS)
        page = opened.value
        for shown in ("result/pass_at_1/rl-80k", str(SOLVED["rl-80k"]), str(SOLVED["rl-40k"])):
            expect(page.get_by_text(shown, exact=True).first).to_be_visible(timeout=SECONDS)
        check(visit)


def test_flow_run_tells_what_ran_how_long_and_what_it_gained(
    browser: Browser, runs: Runs, flow_runs: tuple[Run, Run]
) -> None:
    finished = flow_runs[0]
    with browser.visit(address(runs, finished)) as visit:
        page = visit.page
        text = whole_description(page)
        assert f"{len(runs.order)} stages ran" in text
        assert f"held-out pass@1 {KEY['evaluate'][1]:.4g} → {KEY['evaluate'][2]:.4g} (evaluate)" in text
        assert "no Docker engine <here> & none was asked for" in text
        rows = page.locator("main table").first.locator("tr")
        shown = {
            cells[0].split()[-1]: cells
            for cells in (row.locator("td").all_inner_texts() for row in rows.all())
            if cells
        }
        assert list(shown) == runs.order
        for stage, (metric, before, after) in KEY.items():
            result = runs.result(stage)
            assert (result["key_metric"], result["before"], result["after"]) == (metric, before, after)
            line = " ".join(shown[stage])
            assert metric in line and f"{after:.4g}" in line
        metrics = finished.data.metrics
        assert metrics["stages_run"] == len(runs.order) and metrics["stages_failed"] == 0
        assert 0 < metrics["stage_seconds"] < metrics["total_seconds"]
        assert 0 < metrics["orchestration_share"] < 1
        for stage, share in SOLVED.items():
            assert metrics[f"result/pass_at_1/{stage}"] == pytest.approx(share)
        expect(page.get_by_text(f"m1 run --profile {PROFILE}")).to_be_visible()
        assert broken_images(page) == []
        check(visit)


def broken_images(page: Page) -> list[str]:
    """Addresses of images that are on the page and show nothing."""
    page.wait_for_load_state("networkidle")
    return page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")


def test_failed_flow_run_tells_where_and_why(browser: Browser, runs: Runs, flow_runs: tuple[Run, Run]) -> None:
    failed = flow_runs[1]
    assert failed.info.status == "FAILED" and failed.data.metrics["stages_failed"] == 1
    with browser.visit(address(runs, failed)) as visit:
        text = whole_description(visit.page)
        assert "Failed at rl-40k" in text and CAUSE in text
        check(visit)


@pytest.mark.parametrize("stage", ["pretrain", "rl-40k", "evaluate"])
def test_stage_run_shows_its_result_metrics_and_figure(
    browser: Browser, runs: Runs, client: MlflowClient, flow_runs: tuple[Run, Run], stage: str
) -> None:
    run = stage_run(client, flow_runs[0], stage)
    result = runs.result(stage)
    metric, before, after = KEY[stage]
    with browser.visit(address(runs, run)) as visit:
        page = visit.page
        text = whole_description(page)
        assert metric in text and f"{before:.4g}" in text and f"{after:.4g}" in text
        assert f"{stage}: a note on <what> was *unusual* & why" in text
        for name, value in result["metrics"].items():
            assert run.data.metrics[f"final/{name.replace('@', '_at_')}"] == pytest.approx(value)
        assert page.locator("main img[src*='get-artifact']").count() >= 1 and broken_images(page) == []
        check(visit)


def test_stage_runs_curves_are_grouped_and_drawn(
    browser: Browser, runs: Runs, client: MlflowClient, flow_runs: tuple[Run, Run]
) -> None:
    run = stage_run(client, flow_runs[0], "pretrain")
    with browser.visit(f"{address(runs, run)}/model-metrics", height=1600) as visit:
        page = visit.page
        for group in ("heldout", "train", "layers"):
            section = page.get_by_role("button").filter(has_text=re.compile(rf"^\s*{group}\s*\(\d+\)"))
            expect(section.first).to_be_visible(timeout=SECONDS)
        expect(page.locator(".js-plotly-plot .scatterlayer .trace").first).to_be_visible(timeout=SECONDS)
        check(visit)


def test_registered_model_has_the_checkpoints(browser: Browser, runs: Runs) -> None:
    with browser.visit(f"{runs.mlflow}/#/models/m1-{PROFILE}") as visit:
        expect(visit.page.get_by_role("link", name="Version 6")).to_be_visible(timeout=SECONDS)
        check(visit)
