"""Fixtures: a filled and an empty service, and a browser whose tabs are checked at the end of each test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

from tests.dashboard import seed
from tests.dashboard.service import Service, serving
from tests.dashboard.visitor import WAIT_MS, Visitor

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
Visit = Callable[..., Visitor]
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="session")
def browser(chromium_path: Path) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(chromium_path), args=list(ARGUMENTS))
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Iterator[Service]:
    """Serve jobs in every state. Tests share this service and must not change its jobs."""
    data_dir = tmp_path_factory.mktemp("filled")
    shutil.copy(migrated_database, data_dir / "lorry.db")
    with serving(seed.fill(data_dir)) as service:
        yield service


@pytest.fixture
def fresh(tmp_path: Path, migrated_database: Path) -> Iterator[Service]:
    """Serve a base model, two files and a worker, without jobs, to one test."""
    shutil.copy(migrated_database, tmp_path / "lorry.db")
    with serving(seed.start(tmp_path)) as service:
        yield service


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Open a tab on a service: visit(service, width=1280, scheme="light", signed_in=True)."""
    contexts: list[BrowserContext] = []
    visitors: list[Visitor] = []

    def begin(service: Service, *, width: int = 1280, scheme: str = "light", signed_in: bool = True) -> Visitor:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # pyright: ignore[reportArgumentType]
        contexts.append(context)
        if signed_in:
            context.add_cookies([{"name": "lorry_session", "value": service.browser_secret(), "url": service.url}])
        visitor = Visitor(page=context.new_page(), origin=service.url)
        visitor.watch()
        visitors.append(visitor)
        return visitor

    yield begin
    for visitor in visitors:
        visitor.assert_clean()
    for context in contexts:
        context.close()
