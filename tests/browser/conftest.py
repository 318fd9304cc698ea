"""Pages are tested in a real headless browser. Where there is none its tests are skipped; with CI set they fail."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from visits import Browser

from m1.run.registry import stages
from tests.flow import scratch

#: Where chromium may be: Debian's, or any on the path. Playwright's own download is never used.
NAMES = ("/usr/bin/chromium", "chromium", "google-chrome")
PROFILE = "scratch"
LONG = 900.0
CAUSE = "made up: rl-40k cannot go on with <this> & that"


@pytest.fixture(scope="session")
def browser() -> Browser:
    """The browser of this machine."""
    for name in NAMES:
        if found := shutil.which(name):
            return Browser(found)
    reason = f"no browser found (looked for {', '.join(NAMES)}). On Debian: apt-get install chromium."
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True)
class Runs:
    """A checkout in which two flow runs have been: one that did everything, and one that failed at rl-40k.

    Attributes:
        mlflow, prefect: addresses of the servers.
        finished, failed: ids of the flow runs in Prefect.
    """

    folder: Path
    mlflow: str
    prefect: str
    finished: str
    failed: str

    def result(self, stage: str) -> dict:
        """What stands in the result.json of the one run that did the work."""
        (file,) = (self.folder / "runs" / PROFILE / stage).glob("*/result.json")
        return json.loads(file.read_text())

    @property
    def order(self) -> list[str]:
        return self.result("pretrain")["request"]["profile"]["order"]


@pytest.fixture(scope="session")
def runs(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Made once, and only where there is a browser to look at them."""
    folder = scratch.make(tmp_path_factory.mktemp("review") / "checkout", parallel__world_size=1)
    shutil.copy(Path(__file__).with_name("light.py"), folder / "light.py")
    for name, record in stages().items():
        text = f"from functools import partial\nfrom light import make\nrun = partial(make, {name!r})\n"
        text = text if record.makes_data else "from light import work as run\n"
        (folder / f"{record.module.replace('.', '/')}.py").write_text(text)
    try:
        scratch.m1(folder, "up", timeout=LONG)
        scratch.m1(folder, "run", "--profile", PROFILE, timeout=LONG)
        scratch.behave(folder, rl_40k={"fail": CAUSE})
        changed = ["--set", "rl-40k.evaluate_every=7"]
        done = scratch.m1(folder, "run", "--profile", PROFILE, *changed, check=False, timeout=LONG)
        assert done.returncode == 3, (done.stdout, done.stderr)
        failed, finished = (run["id"] for run in _flow_runs(folder)[:2])
        yield Runs(folder, _url(folder, "mlflow"), _url(folder, "prefect"), finished, failed)
    finally:
        scratch.m1(folder, "down", check=False, timeout=LONG)
        for process in scratch.processes(folder):
            scratch.kill(process)


def _url(folder: Path, service: str) -> str:
    return json.loads((folder / ".m1" / "services" / f"{service}.json").read_text())["extra"]["url"]


def _flow_runs(folder: Path) -> list[dict]:
    """Flow runs of the checkout's Prefect server, the newest first."""
    wanted = {"sort": "EXPECTED_START_TIME_DESC", "limit": 5}
    answer = httpx.post(f"{_url(folder, 'prefect')}/api/flow_runs/filter", json=wanted, timeout=60, trust_env=False)
    answer.raise_for_status()
    return answer.json()
