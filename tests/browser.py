"""The machine's own Chromium, headless, for tests of pages: `from browser import chromium` gives the fixture."""

from __future__ import annotations

import shutil

import pytest

_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--font-render-hinting=none"]


def find_chromium() -> str:
    """Path of the browser; fails the test that needs it, with the command that installs it."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.fail("This test needs Chromium: apt-get update && apt-get install -y chromium", pytrace=False)


@pytest.fixture(scope="module")
def chromium():
    """A running browser; ended with the module, since Playwright's loop is in the way of asyncio's."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=_ARGUMENTS)
        yield browser
        browser.close()


class Watched:
    """A page whose console errors, uncaught exceptions and requests are kept.

    Attributes:
        errors: what went wrong, as text.
        requests: addresses that the page asked for.
    """

    def __init__(self, browser, *, width=1400, height=900, dark=False):
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on(
            "console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.context.close()
