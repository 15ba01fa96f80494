"""The token bucket of a rate limit, and the headers of rate limits on every inference answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from api.rate_limits.limits import MAX_DEBT_SECONDS, Bucket, Limits, Rate, charge, take
from api.settings import ApiSettings
from tests.catalog.world import World

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


NAMES = [f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset")]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "smol", "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"model": "smol", "prompt": "Hi"},
}


@pytest.fixture
def app(app: FastAPI) -> FastAPI:
    """Return the app with a limit of three requests per minute and a clock that stands."""
    limits = Limits(ApiSettings(requests_per_minute=3), clock=lambda: 100.0)
    app.state.services = replace(app.state.services, limits=limits)
    return app


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("changes", "status"),
    [({}, 503), ({"stream": True}, 503), ({"model": "none"}, 404), ({"max_tokens": -1}, 400), ({"other": 1}, 400)],
)
def test_errors_have_the_headers(
    world: World, client: TestClient, path: str, changes: dict[str, Any], status: int
) -> None:
    answer = client.post(path, json={**BODIES[path], **changes})

    assert answer.status_code == status
    assert [answer.headers.get(name) for name in NAMES] == ["3", "2", "20s"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_rejections_have_the_headers(world: World, client: TestClient, path: str, stream: bool) -> None:
    body = {**BODIES[path], "stream": stream}

    *_, refused = [client.post(path, json=body) for _ in range(4)]

    assert refused.status_code == 429
    assert [refused.headers.get(name) for name in NAMES] == ["3", "0", "1m0s"]


@pytest.mark.parametrize("path", BODIES)
def test_responses_before_authentication_have_the_headers_and_count_nothing(
    world: World, client: TestClient, anonymous: TestClient, path: str
) -> None:
    client.post(path, json=BODIES[path])
    json = {"content-type": "application/json"}

    sent = [client.post(path, content=b"{", headers=json), client.get(path), client.post(f"{path}/none", json={})]

    assert [answer.status_code for answer in sent] == [400, 405, 404]
    assert [[answer.headers.get(name) for name in NAMES] for answer in sent] == [["3", "2", "20s"]] * 3
    unknown = anonymous.post(path, content=b"{", headers={**json, "authorization": "Bearer lorry_other"})
    assert [unknown.headers.get(name) for name in NAMES] == [None] * 3


def test_batches_have_the_headers(world: World, client: TestClient) -> None:
    answers = [client.get("/v1/batches"), client.post("/v1/batches", json={})]

    assert [[answer.headers.get(name) for name in NAMES] for answer in answers] == [
        ["3", "2", "20s"],
        ["3", "1", "40s"],
    ]
