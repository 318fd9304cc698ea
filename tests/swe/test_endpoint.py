"""The endpoint against a real server on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from m1.errors import ServiceError
from m1.tasks.swe import endpoint
from m1.tasks.swe.endpoint import Endpoint


class Server(ThreadingHTTPServer):
    """Answers every question with what `reply` says; keeps what it was asked."""

    reply: tuple[int, str] = (200, "")
    asked: list[tuple[dict[str, str], dict[str, Any]]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(({key.lower(): value for key, value in self.headers.items()}, body))
        status, text = self.server.reply
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def completion(text: str) -> str:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/v1/"


def test_an_answer_is_asked_for_once_and_the_key_stays_out_of_the_cache(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M1_ENDPOINT_KEY", "secret-key")
    # Nothing listens there: a loopback address must not go through it.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    server.reply = (200, completion("an answer"))
    ask = Endpoint(url(server), "a-model", tmp_path)
    assert ask("a question") == ask("a question") == "an answer"
    [(headers, body)] = server.asked
    assert headers["authorization"] == "Bearer secret-key"
    assert body["messages"] == [{"role": "user", "content": "a question"}]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("a-model", 0.0, 700)
    [kept] = tmp_path.iterdir()
    assert "secret-key" not in kept.read_text()
    assert Endpoint(url(server), "a-model", tmp_path)("a question") == "an answer" and len(server.asked) == 1
    Endpoint(url(server), "another-model", tmp_path)("a question")
    assert len(server.asked) == 2


@pytest.mark.parametrize("reply", [(404, "{}"), (200, "no JSON"), (200, "{}"), (200, '{"choices": []}'), (200, "[1]")])
def test_nonsense_is_one_line(server: Server, tmp_path: Path, reply: tuple[int, str]) -> None:
    server.reply = reply
    with pytest.raises(ServiceError, match="no answer") as caught:
        Endpoint(url(server), "a-model", tmp_path)("a question")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_RETRIES", 0)
    with pytest.raises(ServiceError, match="no answer"):
        Endpoint("http://127.0.0.1:9/v1", "a-model", tmp_path)("a question")
