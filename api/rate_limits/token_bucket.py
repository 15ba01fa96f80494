"""How much of a rate is left: a bucket of tokens that fills evenly. Pure; the clock is the caller's.

At once a client may have what the bucket holds, and in the long run no more than the limit in each period.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

BURST_PART = 0.1
"""Of a limit: what the bucket holds. A whole minute's requests at once would delay those of all other clients."""
MIN_BURST = 60
"""What the bucket of a larger limit holds at least: what a page of the dashboard or a script asks for at once."""

MAX_DEBT_SECONDS = 10.0
"""How long a client waits at most for its next token because of what was charged afterwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """`limit` in each `period_seconds`."""

    limit: int
    period_seconds: float

    @property
    def per_second(self) -> float:
        return self.limit / self.period_seconds

    @property
    def burst(self) -> int:
        """Tokens of a full bucket."""
        return min(self.limit, max(MIN_BURST, math.ceil(self.limit * BURST_PART)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """What was in it at a moment, in seconds of whatever clock."""

    tokens: float
    at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketState:
    """How a client stands with a rate after it has asked."""

    rate: Rate
    tokens: float
    is_allowed: bool
    cost: int = 1

    def of_one(self) -> BucketState:
        """As if one token had been asked for."""
        return replace(self, cost=1, is_allowed=self.tokens >= 1)

    @property
    def remaining(self) -> int:
        return max(0, math.floor(self.tokens + 1e-6))

    @property
    def reset_seconds(self) -> float:
        """Until the bucket is full."""
        return max(0.0, self.rate.burst - self.tokens) / self.rate.per_second

    @property
    def retry_after_seconds(self) -> float:
        """Until as much is there as was asked for; infinite where that is more than the bucket holds."""
        if self.cost > self.rate.burst:
            return math.inf
        return max(0.0, self.cost - self.tokens) / self.rate.per_second


def take(bucket: Bucket | None, rate: Rate, *, now: float, cost: int = 1) -> tuple[Bucket, BucketState]:
    """The bucket after `cost` tokens were asked for; where there are fewer, none is taken. None: a full one.

    A negative cost gives back. A clock that went backwards fills nothing.
    """
    filled = _filled(bucket, rate, now)
    is_allowed = filled.tokens >= cost
    if is_allowed:
        filled = replace(filled, tokens=min(float(rate.burst), filled.tokens - cost))
    return filled, BucketState(rate=rate, tokens=filled.tokens, is_allowed=is_allowed, cost=cost)


def charge(bucket: Bucket | None, rate: Rate, *, now: float, cost: int) -> tuple[Bucket, BucketState]:
    """The bucket after work that has been done: never refused, it may owe tokens of MAX_DEBT_SECONDS at most."""
    filled = _filled(bucket, rate, now)
    charged = replace(filled, tokens=max(filled.tokens - cost, -rate.per_second * MAX_DEBT_SECONDS))
    return charged, BucketState(rate=rate, tokens=charged.tokens, is_allowed=True)


def _filled(bucket: Bucket | None, rate: Rate, now: float) -> Bucket:
    if bucket is None:
        return Bucket(tokens=float(rate.burst), at=now)
    gained = max(0.0, now - bucket.at) * rate.per_second
    return Bucket(tokens=min(float(rate.burst), bucket.tokens + gained), at=max(now, bucket.at))
