"""The token bucket of a rate limit, at explicit times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.rate_limits.token_bucket import MAX_DEBT_SECONDS, Bucket, Rate, charge, take

MINUTE = Rate(limit=60, period_seconds=60)


def test_full_bucket_grants_its_limit_at_once_then_refills_steadily() -> None:
    bucket: Bucket | None = None
    granted: list[bool] = []

    for now in [0.0] * 61 + [0.5, 1.0, 1.0]:
        bucket, standing = take(bucket, MINUTE, now=now)
        granted.append(standing.is_allowed)

    assert granted == [True] * 60 + [False, False, True, False]


def test_rejection_reports_retry_and_reset_times() -> None:
    bucket, _ = take(None, MINUTE, now=0, cost=60)

    _, standing = take(bucket, MINUTE, now=0.25)

    assert (standing.is_allowed, standing.remaining) == (False, 0)
    assert standing.retry_after_seconds == pytest.approx(0.75)
    assert standing.reset_seconds == pytest.approx(59.75)
    bucket, later = take(bucket, MINUTE, now=0.25 + standing.retry_after_seconds)
    assert later.is_allowed


def test_cost_above_the_limit_is_never_allowed() -> None:
    bucket, standing = take(None, MINUTE, now=0, cost=61)

    assert (standing.is_allowed, standing.retry_after_seconds, bucket.tokens) == (False, float("inf"), 60)


def test_returned_tokens_do_not_exceed_the_limit() -> None:
    bucket, _ = take(None, MINUTE, now=0, cost=5)

    bucket, _ = take(bucket, MINUTE, now=0, cost=-5)
    over, _ = take(bucket, MINUTE, now=0, cost=-5)

    assert bucket.tokens == over.tokens == 60


def test_debt_of_later_charges_is_limited() -> None:
    bucket, some = charge(None, MINUTE, now=0, cost=65)
    assert (bucket.tokens, some.remaining, some.reset_seconds) == (-5, 0, 65)

    bucket, _ = charge(bucket, MINUTE, now=0, cost=1000)

    _, early = take(bucket, MINUTE, now=0)
    assert (early.is_allowed, early.retry_after_seconds) == (False, MAX_DEBT_SECONDS + 1)
    assert take(bucket, MINUTE, now=MAX_DEBT_SECONDS + 1)[1].is_allowed


@given(
    limit=st.integers(1, 5),
    period=st.sampled_from([1.0, 60.0, 86_400.0]),
    waits=st.lists(st.just(0.0) | st.floats(-5, 100), max_size=60),
)
def test_no_interval_grants_more_than_limit_plus_refill(limit: int, period: float, waits: list[float]) -> None:
    rate = Rate(limit=limit, period_seconds=period)
    bucket: Bucket | None = None
    now, moments = 0.0, list[float]()

    for wait in waits:
        now += wait  # negative: the clock was set back
        bucket, standing = take(bucket, rate, now=now)
        assert 0 <= standing.tokens <= limit
        if standing.is_allowed:
            moments.append(bucket.at)

    for first, began in enumerate(moments):
        for last, ended in enumerate(moments[first:], start=1):
            assert last <= limit + (ended - began) * rate.per_second + 1e-6


@pytest.mark.parametrize(("limit", "burst"), [(5, 5), (60, 60), (600, 60), (6000, 600)])
def test_burst_is_a_tenth_of_the_limit_or_60_but_at_most_the_limit(limit: int, burst: int) -> None:
    rate = Rate(limit=limit, period_seconds=60)

    bucket, all_at_once = take(None, rate, now=0, cost=burst)
    _, one_more = take(bucket, rate, now=0)

    assert (all_at_once.is_allowed, one_more.is_allowed) == (True, False)
    assert one_more.retry_after_seconds == pytest.approx(60 / limit)
    assert take(bucket, rate, now=10_000)[1].remaining == burst - 1
