"""How often a key may ask: told in the OpenAI client's headers, refused with 429."""

from __future__ import annotations

import math
from collections.abc import Mapping

from api.rate_counters import RateCounter
from api.settings import ApiSettings
from api.token_bucket import Rate, Standing
from catalog.errors import RateLimited
from catalog.keys import Caller

MINUTE = 60.0


class Limits:
    """Those of the settings, and of a key that has its own. 0: none, and then nothing is counted."""

    def __init__(self, settings: ApiSettings, counter: RateCounter) -> None:
        self._settings = settings
        self._counter = counter

    def count_request(self, caller: Caller) -> dict[str, str]:
        """The headers of the answer. Raises RateLimited, with them too."""
        limit = _own(caller.requests_per_minute, self._settings.requests_per_minute)
        if limit == 0:
            return {}
        rate = Rate(limit=limit, period_seconds=MINUTE)
        standing = self._counter.take(f"requests:{caller.api_key_id}", rate)
        if not standing.is_allowed:
            raise _refused(standing, f"{limit} requests a minute")
        return headers(standing)

    @property
    def jobs_per_day(self) -> int:
        """Of a key without a number of its own; counted with the jobs themselves, by catalog.quotas."""
        return self._settings.jobs_per_day


def headers(standing: Standing) -> dict[str, str]:
    """As the OpenAI API tells them."""
    return {
        "x-ratelimit-limit-requests": str(standing.rate.limit),
        "x-ratelimit-remaining-requests": str(standing.remaining),
        "x-ratelimit-reset-requests": duration(standing.reset_seconds),
    }


def duration(seconds: float) -> str:
    """`20ms`, `1s`, `6m0s`, `2h0m0s`: never less than it is."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000 - 1e-6)}ms"
    minutes, rest = divmod(math.ceil(seconds - 1e-6), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s" if minutes else f"{rest}s"


def retry_headers(error: RateLimited) -> Mapping[str, str]:
    """When to come again. Clients wait no longer than two minutes: beyond that they are told not to."""
    after = error.retry_after_seconds
    told = {**error.headers}
    if math.isfinite(after):
        told |= {"retry-after": str(max(1, math.ceil(after - 1e-6)))}
    if after > 120:
        told["x-should-retry"] = "false"
    elif after > 0:
        told["retry-after-ms"] = str(max(1, math.ceil(after * 1000 - 1e-3)))
    return told


def _own(of_the_key: int | None, of_the_service: int) -> int:
    return of_the_service if of_the_key is None else of_the_key


def _refused(standing: Standing, what: str) -> RateLimited:
    after = standing.retry_after_seconds
    remedy = f"Try again in {duration(after)}." if math.isfinite(after) else "Ask for fewer at once."
    return RateLimited(
        f"The API key has reached its limit of {what}.",
        code="rate_limit_exceeded",
        remedy=f"{remedy} An operator can give the key a higher limit: lorry keys limit.",
        retry_after_seconds=after,
        headers=headers(standing),
    )
