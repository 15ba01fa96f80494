"""Prints why some blocks of the pages are not run."""

from __future__ import annotations

import pytest

from tests.docs.pages import blocks, name, pages


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [(page, block) for page in pages() for block in blocks(page) if block.not_run is not None]
    if skipped:
        terminalreporter.section("blocks of pages that are not run")
        for page, block in skipped:
            terminalreporter.line(f"{name(page)}:{block.line}: {block.not_run}")
