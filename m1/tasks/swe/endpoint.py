"""A model behind an OpenAI-style endpoint; answers are kept, so that a second run asks nothing again."""

from __future__ import annotations

import ipaddress
import json
import os
from pathlib import Path
from urllib.parse import urlsplit

from m1.errors import ServiceError
from m1.files import write_json
from m1.tasks.swe.tasks import content_id

_RETRIES, _SECONDS = 2, 120.0


class Endpoint:
    """`ask(prompt)` through `<url>/chat/completions`, with the `openai` client.

    Args:
        url: base address, such as http://127.0.0.1:8000/v1.
        cache: folder of the answers, one file each, named by the hash of model and prompt.

    The environment variable M1_ENDPOINT_KEY, if set, is sent as the bearer token; it is never written anywhere. An
    address on this machine is asked directly, whatever proxy the environment names.
    """

    def __init__(self, url: str, model: str, cache: Path, *, max_tokens: int = 700) -> None:
        from openai import DefaultHttpxClient, OpenAI

        self.url, self.model, self.cache, self.max_tokens = url.rstrip("/"), model, cache, max_tokens
        self._client = OpenAI(
            base_url=self.url,
            api_key=os.environ.get("M1_ENDPOINT_KEY") or "none",
            timeout=_SECONDS,
            max_retries=_RETRIES,
            http_client=DefaultHttpxClient(trust_env=not _is_local(self.url)),
        )

    def __call__(self, prompt: str) -> str:
        """The answer's text.

        Raises:
            ServiceError: no usable answer after some tries.
        """
        kept = self.cache / f"{content_id(self.url, self.model, str(self.max_tokens), prompt)}.json"
        if kept.is_file():
            return str(json.loads(kept.read_text(encoding="utf-8"))["answer"])
        answer = self._ask(prompt)
        write_json(kept, {"prompt": prompt, "answer": answer})
        return answer

    def _ask(self, prompt: str) -> str:
        from openai import OpenAIError

        try:
            found = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0.0,
                max_tokens=self.max_tokens,
            )
            return found.choices[0].message.content or ""
        # A server that talks nonsense makes the client stumble over fields that are not there.
        except (OpenAIError, ValueError, TypeError, AttributeError, IndexError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ServiceError(
                f"{self.url}: no answer: {reason}", "Check the address, the model's name and the server."
            ) from error


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
