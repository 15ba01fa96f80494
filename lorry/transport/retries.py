"""Decides whether and when a request is retried. Pure: the caller provides the clock and the sleep."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_LONGEST_RETRY_AFTER_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """Exponential back-off with jitter: first, 2·first, 4·first … up to `longest_seconds`."""

    max_retries: int = 4
    first_seconds: float = 0.5
    longest_seconds: float = 8.0
    uniform: Callable[[], float] = random.random
    """Returns a number in [0, 1)."""
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def delay(self, retry: int, headers: Mapping[str, str] | None = None) -> float:
        """Return the delay in seconds before the retry `retry` (from 0). Retry-After overrides it, up to 2 minutes."""
        retry_after = None if headers is None else self._retry_after(headers)
        if retry_after is not None and 0 <= retry_after <= _LONGEST_RETRY_AFTER_SECONDS:
            return retry_after
        full = min(self.longest_seconds, self.first_seconds * 2.0 ** min(retry, 30))
        return full * (1.0 - 0.25 * self.uniform())

    def _retry_after(self, headers: Mapping[str, str]) -> float | None:
        value = headers.get("retry-after", "")
        try:
            return float(value)
        except ValueError:
            pass
        try:
            return max(0.0, (parsedate_to_datetime(value) - self.now()).total_seconds())
        except (ValueError, TypeError):
            return None


def is_retryable(status: int, headers: Mapping[str, str]) -> bool:
    """Return whether to retry. `x-should-retry` decides if present; else 408, 429 and 5xx are retried."""
    should_retry = headers.get("x-should-retry", "").lower()
    if should_retry in {"true", "false"}:
        return should_retry == "true"
    return status in {408, 429} or status >= 500
