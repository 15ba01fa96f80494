"""A Chromium for the dashboard tests, which Playwright drives."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.services.programs import find_or_install, install_debian, install_playwright_browser, on_path

INSTALLS = (partial(install_debian, "chromium"), install_playwright_browser)

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CACHES = (Path.home() / ".cache/ms-playwright", Path.home() / "Library/Caches/ms-playwright")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def chromium_program() -> Path:
    """Return the program of the browser, which is installed if necessary."""
    return find_or_install(find, name="Chromium", installs=INSTALLS)


def find() -> Path | None:
    return on_path(*NAMES) or (MAC if MAC.exists() else _of_playwright())


def _of_playwright() -> Path | None:
    """Return a browser that `playwright install chromium` has installed."""
    patterns = ("chromium-*/chrome-linux*/chrome", "chromium-*/chrome-mac*/*/Contents/MacOS/*")
    found = (path for cache in CACHES for pattern in patterns for path in cache.glob(pattern))
    return next(iter(sorted(found, reverse=True)), None)
