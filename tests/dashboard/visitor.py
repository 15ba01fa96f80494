"""A browser tab that records everything that a page must not do."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import ConsoleMessage, Page, Request

AXE = Path(__file__).parent / "axe" / "axe.min.js"
WATCH_POLICY = """
window.policyViolations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.policyViolations.push(`${event.violatedDirective}: ${event.blockedURI}`));
"""
WAIT_MS = 15_000
DRAWN = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
"""Waits for two frames, until updates are drawn. A change of the hash loads no document to wait for."""
HARMLESS = "Failed to load resource"
"""The browser logs this line for a status of 400 or more. Tests check the status instead."""


@dataclass(kw_only=True)
class Visitor:
    page: Page
    origin: str
    problems: list[str] = field(default_factory=list[str])

    def watch(self) -> None:
        self.page.set_default_timeout(WAIT_MS)
        self.page.add_init_script(WATCH_POLICY)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.problems.append(f"script error: {error}"))
        self.page.on("request", self._on_request)

    def open(self, place: str) -> None:
        """Open a page of the dashboard, such as `#/queue`, and wait until it is drawn.

        A page draws each part when its data arrives, so a test must wait for the parts that it checks.
        """
        self.page.goto(f"{self.origin}/dashboard/{place}")
        self.page.evaluate(DRAWN)
        self.page.locator("main h1").wait_for()
        self.page.locator(".loading").wait_for(state="detached")

    def text(self) -> str:
        return self.page.locator("main").inner_text()

    def assert_clean(self) -> None:
        violations: list[str] = self.page.evaluate("window.policyViolations ?? []")
        assert [*self.problems, *violations] == []

    def assert_fits(self) -> None:
        wide = self.page.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth, document.body.scrollWidth]"
        )
        assert max(wide) <= wide[1], f"{self.page.url} is {max(wide)} px wide in a window of {wide[1]}"

    def assert_accessible(self) -> None:
        """Assert that axe-core finds no serious violations."""
        self.page.evaluate(AXE.read_text())
        found: dict[str, Any] = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        serious = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
        summary = [(one["id"], [node["html"][:200] for node in one["nodes"]][:3]) for one in serious]
        assert summary == [], f"{self.page.url}\n{json.dumps(summary, indent=2)}"

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and HARMLESS not in message.text:
            self.problems.append(f"console: {message.text}")

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self.origin, "data:", "blob:")):
            self.problems.append(f"request to another origin: {request.url}")
