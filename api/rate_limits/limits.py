"""Rate limits per key, and per address without a valid key. Each process counts alone and rejects with 429.

A token bucket fills evenly. A client may spend the whole bucket at once, but no more than the limit per period in the
long run.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv6Address, ip_address, ip_network

import anyio

from api.settings import ApiSettings
from catalog.errors import RateLimited, Unauthorized
from catalog.tenancy import authentication
from catalog.tenancy.authentication import Caller

MINUTE = 60.0
CHECKS_BEYOND_FAILURES = 2
"""Concurrent checks of credentials for all addresses without failures left: too few to delay other checks."""
IPV6_PREFIX = 64
"""Network size of a typical client: the addresses within one network are counted together."""
MAX_BUCKETS = 10_000
"""Above this number, full buckets are dropped, which has no effect. If none is full, the least recently used one is."""
MAX_RECOGNIZED = 10_000
REQUESTS = "requests:"
"""Prefix of the names of the keys' buckets, before the key's id."""
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


FAILURES = Rate(limit=60, period_seconds=MINUTE)
"""Requests without a valid key that one address may send."""


class Limits:
    """The limits of the settings, or of a key that has its own. 0 means no limit, and nothing is counted."""

    def __init__(self, settings: ApiSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._buckets = Buckets(clock=clock)
        self._recognized: dict[bytes, tuple[str, Rate] | None] = {}
        """Digests of credentials that were valid, with the bucket in which their requests are counted."""
        self._salt = secrets.token_bytes(32)
        self._checks_beyond = anyio.CapacityLimiter(CHECKS_BEYOND_FAILURES)

    def count_request(self, caller: Caller, credential: str | None) -> dict[str, str]:
        """Count a request and return the headers of the response. Raises RateLimited with the same headers."""
        counted = self._counted(caller)
        self._recognize(self._digest(credential), counted)
        if counted is None:
            return {}
        bucket_state = self._buckets.take(*counted)
        if not bucket_state.is_allowed:
            raise _rate_limited(bucket_state, caller.api_key_id)
        return headers(bucket_state)

    def charge(self, caller: Caller, num_requests: int) -> dict[str, str]:
        """Count a request that did the work of `num_requests` others. It is not rejected, but the key's next requests
        may be. Returns the headers of the response, as `count_request` does."""
        counted = self._counted(caller)
        return headers(self._buckets.charge(*counted, cost=num_requests)) if counted else {}

    def refusal(self, credential: str) -> RateLimited | None:
        """Return the error if this process has accepted the credential before and its key has no requests left, else
        None. Does not query the database."""
        counted = self._recognized.get(self._digest(credential))
        if counted is None or (remaining := self._buckets.take(*counted, cost=0)).tokens >= 1:
            return None
        return _rate_limited(remaining.of_one(), counted[0].removeprefix(REQUESTS))

    def known_headers(self, credential: str) -> dict[str, str]:
        """Return the headers of a response that was sent before authentication, such as for a body that is not JSON.

        Nothing is counted. Empty if this process does not know the credential, or its key has no limit.
        """
        counted = self._recognized.get(self._digest(credential))
        return {} if counted is None else headers(self._buckets.take(*counted, cost=0))

    @asynccontextmanager
    async def guarding(self, address: str | None, credential: str | None) -> AsyncGenerator[None]:
        """Wrap the check of a credential, which raises Unauthorized. Raises RateLimited if the address has sent too
        many invalid credentials.

        Each check reserves one failure of its address and returns it if the credential is valid. If an address has no
        failures left, its requests are rejected before the check, except credentials that have the form of a secret.
        Those are checked, a few at a time: secrets can't be guessed, so the limit only protects the database, and
        other clients behind the same address can't lock out a client with a valid key. A credential that was valid in
        this process before is always checked. If the settings limit no requests, none of these limits apply.
        """
        if self._settings.requests_per_minute == 0:
            yield
            return
        name, digest = f"failures:{_network(address)}", self._digest(credential)
        is_known = digest in self._recognized
        bucket_state = self._buckets.take(name, FAILURES, cost=0 if is_known else 1)
        is_reserved = not is_known and bucket_state.is_allowed
        try:
            if is_known or is_reserved:
                yield
            elif credential is not None and authentication.SECRET_TEXT.fullmatch(credential):
                async with self._checks_beyond:
                    yield
            else:
                raise _too_many_failures(bucket_state, address)
        except Unauthorized as error:
            self._recognized.pop(digest, None)
            if not is_reserved and not (bucket_state := self._buckets.take(name, FAILURES)).is_allowed and not is_known:
                raise _too_many_failures(bucket_state, address) from error
            raise
        except BaseException:  # the check did not complete: the credential is neither valid nor invalid
            self._return_reserved(name, is_reserved=is_reserved)
            raise
        self._return_reserved(name, is_reserved=is_reserved)
        self._recognize(digest, self._recognized.get(digest))

    @property
    def jobs_per_day(self) -> int:
        """The daily limit of a key without a limit of its own; catalog.usage.quotas counts the jobs."""
        return self._settings.jobs_per_day

    def _counted(self, caller: Caller) -> tuple[str, Rate] | None:
        """Return the key's bucket; None for a key without a limit."""
        own = caller.requests_per_minute
        limit = self._settings.requests_per_minute if own is None else own
        return (f"{REQUESTS}{caller.api_key_id}", Rate(limit=limit, period_seconds=MINUTE)) if limit else None

    def _return_reserved(self, name: str, *, is_reserved: bool) -> None:
        if is_reserved:
            self._buckets.take(name, FAILURES, cost=-1)

    def _digest(self, credential: str | None) -> bytes:
        return hashlib.blake2b((credential or "").encode("utf-8", "replace"), key=self._salt).digest()

    def _recognize(self, digest: bytes, counted: tuple[str, Rate] | None) -> None:
        self._recognized.pop(digest, None)
        self._recognized[digest] = counted
        if len(self._recognized) > MAX_RECOGNIZED:
            self._recognized.pop(next(iter(self._recognized)), None)


class Buckets:
    """Token buckets by name, timed by a monotonic clock."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[Bucket, Rate]] = {}

    @property
    def num_buckets(self) -> int:
        return len(self._buckets)

    def take(self, name: str, rate: Rate, *, cost: int = 1) -> BucketState:
        """Take `cost` tokens from the bucket of that name if it has them; a negative cost returns tokens."""
        return self._change(name, rate, partial(take, cost=cost))

    def charge(self, name: str, rate: Rate, *, cost: int) -> BucketState:
        """Take `cost` tokens from the bucket of that name, whether or not it has them."""
        return self._change(name, rate, partial(charge, cost=cost))

    def _change(self, name: str, rate: Rate, change: Callable[..., tuple[Bucket, BucketState]]) -> BucketState:
        with self._lock:
            now = self._clock()
            kept = self._buckets.pop(name, None)
            bucket, bucket_state = change(kept[0] if kept else None, rate, now=now)
            self._buckets[name] = (bucket, rate)
            if len(self._buckets) > MAX_BUCKETS:
                self._drop_full(now)
            return bucket_state

    def _drop_full(self, now: float) -> None:
        full = [name for name, kept in self._buckets.items() if take(*kept, now=now, cost=0)[1].reset_seconds == 0]
        for name in full or [next(iter(self._buckets))]:
            del self._buckets[name]


def headers(bucket_state: BucketState) -> dict[str, str]:
    """Return the rate-limit headers of the OpenAI API."""
    return {
        "x-ratelimit-limit-requests": str(bucket_state.rate.limit),
        "x-ratelimit-remaining-requests": str(bucket_state.remaining),
        "x-ratelimit-reset-requests": duration(bucket_state.reset_seconds),
    }


def duration(seconds: float) -> str:
    """Format as `20ms`, `1s`, `6m0s` or `2h0m0s`, rounded up."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000 - 1e-6)}ms"
    minutes, rest = divmod(math.ceil(seconds - 1e-6), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s" if minutes else f"{rest}s"


def retry_headers(error: RateLimited) -> Mapping[str, str]:
    """Return the headers that control retries. Clients wait two minutes at most: for longer waits, retries are off."""
    after = error.retry_after_seconds
    found = {**error.headers}
    if math.isfinite(after):
        found |= {"retry-after": str(max(1, math.ceil(after - 1e-6)))}
    if after > 120:
        found["x-should-retry"] = "false"
    elif after > 0:
        found["retry-after-ms"] = str(max(1, math.ceil(after * 1000 - 1e-3)))
    return found


def _rate_limited(bucket_state: BucketState, api_key_id: str) -> RateLimited:
    after = bucket_state.retry_after_seconds
    limit = bucket_state.rate.limit
    if limit == 1:
        if math.isfinite(after):
            return RateLimited(
                "one_request_per_minute",
                key=api_key_id,
                after=duration(after),
                retry_after_seconds=after,
                headers=headers(bucket_state),
            )
        return RateLimited(
            "one_request_per_minute_at_once", key=api_key_id, retry_after_seconds=after, headers=headers(bucket_state)
        )
    if math.isfinite(after):
        return RateLimited(
            "requests_per_minute",
            key=api_key_id,
            limit=limit,
            after=duration(after),
            retry_after_seconds=after,
            headers=headers(bucket_state),
        )
    return RateLimited(
        "requests_per_minute_at_once",
        key=api_key_id,
        limit=limit,
        retry_after_seconds=after,
        headers=headers(bucket_state),
    )


def _network(address: str | None) -> str:
    """Return the address itself, or the network of an IPv6 address."""
    try:
        parsed = ip_address(address or "")
    except ValueError:
        return str(address)
    if isinstance(parsed, IPv6Address):
        return str(ip_network((int(parsed), IPV6_PREFIX), strict=False))
    return str(parsed)


def _too_many_failures(bucket_state: BucketState, address: str | None) -> RateLimited:
    after = bucket_state.retry_after_seconds
    network = _network(address)
    if address:
        if "/" in network:
            return RateLimited(
                "too_many_failures_of_network",
                network=network,
                limit=FAILURES.limit,
                after=duration(after),
                retry_after_seconds=after,
                headers={},
            )
        return RateLimited(
            "too_many_failures_of_address",
            network=network,
            limit=FAILURES.limit,
            after=duration(after),
            retry_after_seconds=after,
            headers={},
        )
    return RateLimited(
        "too_many_failures_of_client",
        limit=FAILURES.limit,
        after=duration(after),
        retry_after_seconds=after,
        headers={},
    )
