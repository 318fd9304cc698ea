"""A real MLflow server for the session, and made-up run folders written through the stages' own contract."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from infra import supervise
from m1 import paths
from m1.config.profile import Profile
from m1.data import content
from m1.files import write_json
from m1.run import profiles, registry
from m1.run.contract import StageContext, StageRequest, StageResult
from m1.run.resolve import resolve
from m1.tracking import Tracker
from tests.checkout import give_code

TINY = profiles.load("tiny").to_dict()


class Server:
    """`mlflow server` on sqlite and a free loopback port, in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it unless it runs."""
        if self._process is not None:
            return
        # The supervisor ends the server also when the test runner itself is killed.
        command = [sys.executable, supervise.__file__, str(os.getpid()), "2"]
        command += [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
        }
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | quiet,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + 900  # minutes on a machine that is busy with other work
        while time.monotonic() < until:
            assert self._process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self.kill()
        raise AssertionError(f"no MLflow server: {(self.folder / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("mlflow"))
    yield started
    started.kill()


@pytest.fixture
def mortal_server(server: Server) -> Iterator[Server]:
    """The session's server, for a test that kills it and starts it again."""
    yield server
    server.start()


@pytest.fixture(scope="session", autouse=True)
def impatient() -> Iterator[None]:
    """One try per request, so that the tests of a dead server are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield


@pytest.fixture
def tracker(server: Server) -> Tracker:
    return Tracker.connect(server.uri)


class House:
    """A made-up checkout: run folders, data folders, dvc.lock, under a profile name of its own."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.profile: Profile = profiles.parse({**TINY, "name": name}, "test")
        self.locked: dict[str, dict] = {}
        give_code(root)
        for data in ("corpus", "tokenizer", "tokens", "sft-data", "synthesize"):
            self.make_data(data, version=1)

    def make_data(self, name: str, version: int) -> str:
        """Write the folder, its summary and its entry in dvc.lock; returns the hash."""
        folder = f"data/{self.profile.name}/{name}"
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        sources = {"some-docs": {"package": "Some", "version": "1.0", "sha256": "5" * 64, "licence": "MIT", "bytes": 7}}
        summary = {"documents": 12 * version, "shares": {"prose": 0.25}, "text": f"of {name}", "flag": True}
        write_json(self.root / folder / "summary.json", summary | ({"sources": sources} if name == "corpus" else {}))
        digest = content.digest_of(self.root / folder)
        deps = [{"path": f"stages/{name}", "hash": "md5", "md5": f"{version}" * 32 + ".dir"}]
        for read in registry.stage(name).reads:
            lock = self.locked[f"{read}@{self.profile.name}"]
            deps.append({"path": f"data/{self.profile.name}/{read}", "hash": "md5", "md5": lock["outs"][0]["md5"]})
        self.locked[f"{name}@{self.profile.name}"] = {
            "cmd": f"python -m stages.{name} --profile {self.profile.name}",
            "deps": deps,
            "params": {f"profiles/{self.profile.name}.yaml": {"seed": 1}},
            "outs": [{"path": folder, "hash": "md5", "md5": digest, "size": 1, "nfiles": 1}],
        }
        (self.root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": self.locked}))
        return digest

    def request(self, name: str, parent: StageResult | None = None) -> StageRequest:
        return resolve(name, self.profile, lambda need: None, parent=parent.request.run if parent else None)

    def context(self, request: StageRequest) -> StageContext:
        return StageContext(request)

    def finish(
        self, request: StageRequest, *, metrics: dict[str, float] | None = None, after: float = 2.0
    ) -> StageResult:
        """Complete a run folder as a stage does."""
        context = StageContext(request)
        (context.output / "log.txt").write_text("one line of log\n")
        (context.output / "checkpoint").mkdir(exist_ok=True)
        figure = context.figures_dir() / "loss.png"
        Image.new("RGB", (8, 8)).save(figure)
        return context.finish(
            checkpoint=context.output / "checkpoint" if request.stage != "evaluate" else None,
            key_metric="held-out loss",
            before=3.0,
            after=after,
            metrics=metrics or {"tokens": 1000.0},
            figures=[figure],
            notes=["a note"],
        )


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> House:
    """Every test has its own checkout and profile name, hence its own experiment and model."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    name = request.node.name.split("[")[0].removeprefix("test_").replace("_", "-")
    return House(tmp_path, name)


@pytest.fixture
def run_stage(tracker: Tracker) -> Callable[..., tuple[str, StageResult]]:
    """Record one complete stage in MLflow; returns (MLflow run id, result)."""

    def run(house: House, flow: str, name: str, parent: StageResult | None = None) -> tuple[str, StageResult]:
        request = house.request(name, parent)
        tracked = tracker.start_stage(flow, name, request)
        tracked.follow()
        result = house.finish(request)
        tracked.finish(result)
        return tracked.run_id, result

    return run
