"""Where the buckets are kept: in this process, or in Redis for all processes.

The arithmetic is api.token_bucket's; Redis does it in one script, so that two processes never take the same token.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from api.token_bucket import Bucket, Rate, Standing, take

MOST_BUCKETS = 10_000
"""Then the full ones are forgotten, which are as good as none."""
AWAY_SECONDS = 5.0
"""How long Redis is not asked after it failed to answer."""
SCRIPT = """
local now = redis.call('TIME')
now = tonumber(now[1]) + tonumber(now[2]) / 1e6
local limit, per_second, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local kept = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens = limit
if kept[1] then
  tokens = math.min(limit, tonumber(kept[1]) + math.max(0, now - tonumber(kept[2])) * per_second)
  now = math.max(now, tonumber(kept[2]))
end
local allowed = 0
if tokens >= cost then
  allowed, tokens = 1, math.min(limit, tokens - cost)
end
redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens), 'at', string.format('%.6f', now))
redis.call('EXPIRE', KEYS[1], math.ceil((limit - tokens) / per_second) + 1)
return {allowed, string.format('%.6f', tokens)}
"""
log = logging.getLogger("lorry.api")


class RateCounter(Protocol):
    def take(self, name: str, rate: Rate, *, cost: int = 1) -> Standing:
        """Ask the bucket of that name for `cost` tokens. Never raises."""
        ...


class ProcessCounter:
    """For one process, by the machine's own steady clock."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[Bucket, Rate]] = {}

    @property
    def num_buckets(self) -> int:
        return len(self._buckets)

    def take(self, name: str, rate: Rate, *, cost: int = 1) -> Standing:
        with self._lock:
            now = self._clock()
            kept = self._buckets.pop(name, None)
            bucket, standing = take(kept[0] if kept else None, rate, now=now, cost=cost)
            self._buckets[name] = (bucket, rate)
            if len(self._buckets) > MOST_BUCKETS:
                self._forget_full(now)
            return standing

    def _forget_full(self, now: float) -> None:
        """Where none is full, the one that was asked longest ago."""
        full = [name for name, kept in self._buckets.items() if take(*kept, now=now, cost=0)[1].reset_seconds == 0]
        for name in full or [next(iter(self._buckets))]:
            del self._buckets[name]


class RedisCounter:
    """For every process that names the same Redis, by its clock. While it is away each process counts by itself."""

    def __init__(self, redis_url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        import redis  # late: a service without one never loads it

        client: Any = redis.Redis
        at: Any = client.from_url(redis_url, socket_timeout=1, socket_connect_timeout=0.5, health_check_interval=30)
        self._script: Any = at.register_script(SCRIPT)
        self._failures: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        self._clock = clock
        self._alone = ProcessCounter(clock=clock)
        self._away_until = 0.0

    def take(self, name: str, rate: Rate, *, cost: int = 1) -> Standing:
        if self._clock() < self._away_until:
            return self._alone.take(name, rate, cost=cost)
        try:
            allowed, tokens = self._script(keys=[f"lorry:rate:{name}"], args=[rate.limit, rate.per_second, cost])
        except self._failures as error:
            log.warning("Redis counts no requests now (%s): each process does.", type(error).__name__)
            self._away_until = self._clock() + AWAY_SECONDS
            return self._alone.take(name, rate, cost=cost)
        return Standing(rate=rate, tokens=float(tokens), is_allowed=bool(allowed), cost=cost)


def open_counter(redis_url: str | None) -> RateCounter:
    return RedisCounter(redis_url) if redis_url else ProcessCounter()
