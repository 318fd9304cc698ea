"""A model behind an OpenAI-style endpoint; answers are kept, so that a second run asks nothing again."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from m1.errors import ServiceError
from m1.tasks.swe.tasks import content_id

_TRIES, _SECONDS = 3, 120.0


class Endpoint:
    """`ask(prompt)` through `<url>/chat/completions`.

    Args:
        url: base address, such as http://127.0.0.1:8000/v1.
        cache: folder of the answers, one file each, named by the hash of model and prompt.

    The environment variable M1_ENDPOINT_KEY, if set, is sent as the bearer token; it is never written anywhere.
    """

    def __init__(self, url: str, model: str, cache: Path, *, max_tokens: int = 700) -> None:
        self.url = url.rstrip("/") + "/chat/completions"
        self.model, self.cache, self.max_tokens = model, cache, max_tokens

    def __call__(self, prompt: str) -> str:
        """The answer's text.

        Raises:
            ServiceError: no usable answer after some tries.
        """
        kept = self.cache / f"{content_id(self.url, self.model, str(self.max_tokens), prompt)}.json"
        if kept.is_file():
            return json.loads(kept.read_text(encoding="utf-8"))["answer"]
        answer = self._post(prompt)
        self.cache.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({"prompt": prompt, "answer": answer}), encoding="utf-8")
        os.replace(unfinished, kept)
        return answer

    def _post(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("M1_ENDPOINT_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        reason = ""
        for attempt in range(_TRIES):
            try:
                request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"] or "")
            except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
                time.sleep(2**attempt)
        raise ServiceError(f"{self.url}: no answer: {reason}", "Check the address, the model's name and the server.")
