"""The check of the containers' logs can fail."""

from __future__ import annotations

import pytest

from tests.compose.logs import problems

FINE = '{"time": "2026-12-01T10:00:00.000+00:00", "level": "info", "logger": "worker", "message": "ready"}'


@pytest.mark.parametrize(
    "line",
    [
        "[tasks]",
        '{"event": "ready"}',
        "Traceback (most recent call last):",
        FINE.replace('"ready"', '"crash", "exception": "Traceback (most recent call last):"'),
    ],
)
def test_line_that_is_no_log_line_or_has_a_traceback_is_a_problem(line: str) -> None:
    assert problems([FINE, "", line]) == [line]
