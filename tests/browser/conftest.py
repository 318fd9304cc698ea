"""Pages are tested in a real headless browser. Where there is none its tests are skipped; with CI set they fail."""

from __future__ import annotations

import os
import shutil

import pytest
from visits import Browser

#: Where chromium may be: Debian's, or any on the path. Playwright's own download is never used.
NAMES = ("/usr/bin/chromium", "chromium", "google-chrome")


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
