"""A token bucket, which fills evenly. Pure; the caller passes the time.

A client may spend the whole bucket at once, but no more than the limit per period in the long run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

BURST_PART = 0.1
"""Size of the bucket as a fraction of the limit. A whole minute of requests at once would delay other clients."""
MIN_BURST = 60
"""Minimum size of a large limit's bucket: a page of the dashboard or a script sends about this number at once."""

MAX_DEBT_SECONDS = 10.0
"""Maximum time that a client waits for its next token because of work that was charged afterwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """A limit of `limit` per `period_seconds`."""

    limit: int
    period_seconds: float

    @property
    def per_second(self) -> float:
        return self.limit / self.period_seconds

    @property
    def burst(self) -> int:
        """Size of a full bucket in tokens."""
        return min(self.limit, max(MIN_BURST, math.ceil(self.limit * BURST_PART)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """The content of a bucket at a point in time, in seconds of any clock."""

    tokens: float
    at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketState:
    """The state of a client's bucket after a request."""

    rate: Rate
    tokens: float
    is_allowed: bool
    cost: int = 1

    def of_one(self) -> BucketState:
        """Return the state as if one token had been requested."""
        return replace(self, cost=1, is_allowed=self.tokens >= 1)

    @property
    def remaining(self) -> int:
        return max(0, math.floor(self.tokens + 1e-6))

    @property
    def reset_seconds(self) -> float:
        """Time until the bucket is full."""
        return max(0.0, self.rate.burst - self.tokens) / self.rate.per_second

    @property
    def retry_after_seconds(self) -> float:
        """Time until the bucket holds the requested tokens; infinite if they exceed the bucket's size."""
        if self.cost > self.rate.burst:
            return math.inf
        return max(0.0, self.cost - self.tokens) / self.rate.per_second


def take(bucket: Bucket | None, rate: Rate, *, now: float, cost: int = 1) -> tuple[Bucket, BucketState]:
    """Take `cost` tokens if the bucket holds them, else none. None stands for a full bucket.

    A negative cost returns tokens. A clock that moved backwards fills nothing.
    """
    filled = _filled(bucket, rate, now)
    is_allowed = filled.tokens >= cost
    if is_allowed:
        filled = replace(filled, tokens=min(float(rate.burst), filled.tokens - cost))
    return filled, BucketState(rate=rate, tokens=filled.tokens, is_allowed=is_allowed, cost=cost)


def charge(bucket: Bucket | None, rate: Rate, *, now: float, cost: int) -> tuple[Bucket, BucketState]:
    """Charge work that has been done. It is never rejected; the debt is at most the tokens of MAX_DEBT_SECONDS."""
    filled = _filled(bucket, rate, now)
    charged = replace(filled, tokens=max(filled.tokens - cost, -rate.per_second * MAX_DEBT_SECONDS))
    return charged, BucketState(rate=rate, tokens=charged.tokens, is_allowed=True)


def _filled(bucket: Bucket | None, rate: Rate, now: float) -> Bucket:
    if bucket is None:
        return Bucket(tokens=float(rate.burst), at=now)
    gained = max(0.0, now - bucket.at) * rate.per_second
    return Bucket(tokens=min(float(rate.burst), bucket.tokens + gained), at=max(now, bucket.at))
