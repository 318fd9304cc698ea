"""What `m1 up` does besides starting servers; the servers themselves are started in tests/flow."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from pathlib import Path

import pytest
from dotenv import dotenv_values

from infra import services
from m1 import paths
from m1.errors import ServiceError


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "STATE", tmp_path / ".m1")
    return tmp_path


def test_a_taken_port_is_replaced_by_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind((services.HOST, 0))
        taken.listen()
        usual = taken.getsockname()[1]
        port = services.free_port(usual)
        assert port != usual
    assert services.free_port(usual) == usual


def test_dotenv_keeps_what_the_user_wrote(checkout: Path) -> None:
    users = b"MINE=1\r\nOTHER='two words' # \xe9\n\n  # no line break at the end"
    (checkout / ".env").write_bytes(users)
    said: list[str] = []
    services.write_dotenv(said.append)
    first = (checkout / ".env").read_bytes()
    services.write_dotenv(said.append)
    assert (checkout / ".env").read_bytes() == first and first.startswith(users)
    found = dotenv_values(checkout / ".env", encoding="latin-1")
    assert found["MINE"] == "1" and found["OTHER"] == "two words"
    assert found["PREFECT_HOME"] == str(paths.STATE / "prefect")
    assert first.count(b"PREFECT_HOME=") == 1 and b"PREFECT_API_URL" not in first, "no address of a server that is off"
    services.down(said.append)
    assert (checkout / ".env").read_bytes() == users and said == []


def test_dotenv_that_cannot_be_written_is_worth_a_line_and_no_more(checkout: Path) -> None:
    (checkout / ".env").mkdir()
    said: list[str] = []
    services.write_dotenv(said.append)
    services.down(said.append)
    assert len(said) == 2
    assert all(line.startswith(f"note: {checkout / '.env'} cannot be written") for line in said)


def test_down_without_services_does_nothing(checkout: Path) -> None:
    said: list[str] = []
    services.down(said.append)
    assert said == [] and not (checkout / ".env").exists()
    assert all(status.pid is None and not status.healthy for status in services.status().values())


def test_a_full_disk_is_refused_with_numbers(checkout: Path) -> None:
    services.check_disk(minimum=1)
    with pytest.raises(ServiceError, match=r"only [\d.]+ GiB free .* needs 1048576 GiB.*Free some space"):
        services.check_disk(minimum=1024**5)


def test_health_is_what_the_server_says() -> None:
    class Sick(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/good" else 503)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.HTTPServer((services.HOST, 0), Sick)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://{services.HOST}:{server.server_port}"
    try:
        assert services.answers(f"{url}/good")
        assert not services.answers(f"{url}/bad")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert not services.answers(f"{url}/good", timeout=1)


def test_children_do_not_inherit_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere:4200/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    environment = services._environment()
    assert "elsewhere" not in " ".join(environment.values())
    assert environment["PREFECT_HOME"].startswith(str(paths.STATE))
    assert os.environ["PREFECT_API_URL"].startswith("http://elsewhere")


def test_a_server_that_ends_at_once_is_one_clear_error(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged database: the message carries the end of the log and its path."""
    store = checkout / ".m1" / "mlflow"
    store.mkdir(parents=True)
    (store / "mlflow.db").write_bytes(b"this is not a database, and long enough to be looked at" * 100)
    with pytest.raises(ServiceError) as caught:
        services._start_server("mlflow")
        services._await_healthy("mlflow")
    assert "MLflow server ended while starting" in str(caught.value)
    assert "not a database" in str(caught.value)
    assert str(services.log_file("mlflow")) in str(caught.value)
    assert "\n" not in str(caught.value)
