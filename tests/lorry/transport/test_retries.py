"""Which responses are retried, and after which delay."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from lorry.transport.retries import RetryPolicy, is_retryable

POLICY = RetryPolicy(uniform=lambda: 0.0, now=lambda: datetime(2026, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 507])
def test_transient_statuses_are_retried(status: int) -> None:
    assert is_retryable(status, {})


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422])
def test_permanent_statuses_are_not_retried(status: int) -> None:
    assert not is_retryable(status, {})


def test_x_should_retry_takes_precedence() -> None:
    assert is_retryable(409, {"x-should-retry": "true"})
    assert not is_retryable(507, {"x-should-retry": "false"})


def test_delay_doubles_up_to_a_limit() -> None:
    assert [POLICY.delay(retry) for retry in range(6)] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert POLICY.delay(10_000) == 8.0


def test_jitter_only_shortens_the_delay() -> None:
    assert RetryPolicy(uniform=lambda: 0.999).delay(0) == pytest.approx(0.375, abs=0.001)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("Thu, 01 Jan 2026 00:00:09 GMT", 9.0),
        ("Wed, 31 Dec 2025 00:00:00 GMT", 0),
    ],
)
def test_retry_after_is_honored(value: str, seconds: float) -> None:
    assert POLICY.delay(3, {"retry-after": value}) == seconds


@pytest.mark.parametrize("value", ["", "soon", "-5", "86400", "nan", "inf", "Thu, 01 Jan 2126 00:00:00 GMT"])
def test_invalid_retry_after_is_ignored(value: str) -> None:
    assert POLICY.delay(0, {"retry-after": value}) == 0.5
