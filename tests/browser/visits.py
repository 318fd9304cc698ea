"""A headless browser and the pages it opens, for every test of a page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from playwright.sync_api import Browser as Chromium
from playwright.sync_api import ConsoleMessage, Page, Request, Response, sync_playwright

#: Nothing but the tested page is fetched: no updates, no components, no accounts.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass
class Visit:
    """One page that is open, and what went on in it so far.

    Attributes:
        errors: what the console reported as an error, and exceptions that nothing caught.
        failed: requests that failed or were answered with an error, with the reason.
        requested: every address that was asked for, in order.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Collect from now on."""

        def console(message: ConsoleMessage) -> None:
            if message.type == "error":
                self.errors.append(message.text)

        def answered(response: Response) -> None:
            if response.status >= 400:
                self.failed.append(f"{response.url[:200]}: status {response.status}")

        def failed(request: Request) -> None:
            self.failed.append(f"{request.url[:200]}: {request.failure}")

        self.page.on("console", console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("requestfailed", failed)
        self.page.on("response", answered)


class Browser:
    """Chromium, which runs from the first of several visits at once to the end of the last.

    It does not run longer than that because Playwright's event loop counts as running in this thread all the while,
    and `asyncio.run` would fail in the tests of other folders.
    """

    def __init__(self, executable: str) -> None:
        self.executable = executable
        self._visits = 0
        self._started = contextlib.ExitStack()
        self._chromium: Chromium | None = None

    @contextlib.contextmanager
    def visit(self, address: str, width: int = 1280, height: int = 900) -> Iterator[Visit]:
        """Open `address` (http, https or file) in a window of that size and wait until it is loaded.

        Every visit has its own cookies and storage.
        """
        with self._running() as chromium, contextlib.closing(chromium.new_context()) as context:
            opened = Visit(context.new_page())
            opened.page.set_viewport_size({"width": width, "height": height})
            opened.watch()
            opened.page.goto(address, wait_until="load")
            yield opened

    @contextlib.contextmanager
    def _running(self) -> Iterator[Chromium]:
        if self._chromium is None:
            playwright = self._started.enter_context(sync_playwright())
            chromium = playwright.chromium.launch(executable_path=self.executable, args=list(ARGUMENTS))
            self._chromium = self._started.enter_context(contextlib.closing(chromium))
        self._visits += 1
        try:
            yield self._chromium
        finally:
            self._visits -= 1
            if not self._visits:
                self._chromium = None
                self._started.close()
