"""Per-key limits on requests per minute and jobs per day, as clients see them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.deps import Services
from api.rate_limits.limits import (
    CHECKS_BEYOND_FAILURES,
    FAILURES,
    MAX_BUCKETS,
    MAX_DEBT_SECONDS,
    Buckets,
    Limits,
    Rate,
    duration,
)
from api.settings import ApiSettings
from catalog.caller import Caller
from catalog.db.database import Database
from catalog.error_texts import ErrorText
from catalog.errors import Unauthorized
from catalog.pepper import Pepper
from catalog.tenancy import authentication
from lorry import Lorry, RateLimited
from tests.api.conftest import new_key, with_key
from tests.api.site import Site, error_of
from tests.catalog.world import PEPPER, World, end_key

JOBS = "/v1/fine_tuning/jobs"
RATE = Rate(limit=3, period_seconds=60)


def new_key_text() -> str:
    """Return the text of a key that is not stored."""
    return authentication.new_key("project-1", "none", PEPPER)[1]


class ManualClock:
    """A clock that moves only when a test advances it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def manual_clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def app(app: FastAPI, manual_clock: ManualClock) -> FastAPI:
    """Return the app with limits of three requests per minute and two jobs per day."""
    services: Services = app.state.services
    limits = Limits(ApiSettings(requests_per_minute=3, jobs_per_day=2), clock=manual_clock)
    app.state.services = replace(services, limits=limits)
    return app


def test_responses_report_remaining_requests_and_excess_is_rejected(
    client: TestClient, manual_clock: ManualClock, key: str
) -> None:
    answers = [client.get(path) for path in ("/v1/files", "/v1/files/none", "/v1/queue", "/v1/files")]

    shown = [
        [answer.headers[f"x-ratelimit-{what}-requests"] for what in ("limit", "remaining", "reset")]
        for answer in answers
    ]
    assert shown == [["3", "2", "20s"], ["3", "1", "40s"], ["3", "0", "1m0s"], ["3", "0", "1m0s"]]
    assert [answer.status_code for answer in answers] == [200, 404, 200, 429]
    error = error_of(answers[3])
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    key_id = key.split("_")[1]
    assert f"API key {key_id} has reached its limit of 3 requests per minute." in error["message"]
    assert f"`lorry keys update {key_id} --requests-per-minute NUMBER`" in error["remedy"]
    assert "Try again in 20s" in error["message"]
    assert (answers[3].headers["retry-after"], answers[3].headers["retry-after-ms"]) == ("20", "20000")
    manual_clock.advance(20)
    assert client.get("/v1/files").status_code == 200


def test_excess_requests_are_rejected_without_database_access(
    client: TestClient, manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups: list[str] = []
    authenticate = authentication.authenticate

    def counted(db: Database, *, secret: str, pepper: Pepper) -> Caller:
        lookups.append(secret)
        return authenticate(db, secret=secret, pepper=pepper)

    monkeypatch.setattr(authentication, "authenticate", counted)

    statuses = [client.get("/v1/files").status_code for _ in range(9)]
    manual_clock.advance(20)
    statuses.append(client.get("/v1/files").status_code)

    assert statuses == [200] * 3 + [429] * 6 + [200]
    assert len(lookups) == 4


def test_each_trial_of_a_sweep_counts_as_a_request(
    client: TestClient, operator: TestClient, key: str, world: World, manual_clock: ManualClock
) -> None:
    operator.post(f"/v1/api_keys/{key.split('_')[1]}/limits", json={"requests_per_minute": 60, "jobs_per_day": 0})
    files = {"training_file": world.file_id, "validation_file": world.file_id}
    search = {"search": {"type": "random", "trials": 50}, "parameters": {"lora.rank": {"min": 1, "max": 64}}}
    body = {"model": "smol", **files, **search}
    once = {"idempotency-key": "once"}

    made, again = (client.post("/v1/sweeps", json=body, headers=once) for _ in range(2))
    another = client.post("/v1/sweeps", json=body)

    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in (made, again, another)]
    assert left == ["9", "8", "0"]
    manual_clock.advance(MAX_DEBT_SECONDS)
    assert client.get("/v1/files").status_code == 429
    manual_clock.advance(1)
    assert client.get("/v1/files").status_code == 200


def test_each_key_has_its_own_limit_and_open_routes_have_none(
    client: TestClient, stranger: TestClient, anonymous: TestClient
) -> None:
    for _ in range(3):
        client.get("/v1/files")

    assert client.get("/v1/files").status_code == 429
    assert stranger.get("/v1/files").status_code == 200
    for path in ("/healthz", "/readyz", "/metrics", "/dashboard/", "/openapi.json"):
        for answer in [anonymous.get(path) for _ in range(5)]:
            assert answer.status_code == 200
            assert "x-ratelimit-limit-requests" not in answer.headers


def test_rejected_jobs_do_not_count_towards_the_daily_limit(
    client: TestClient, operator: TestClient, key: str, world: World
) -> None:
    operator.post(f"/v1/api_keys/{key.split('_')[1]}/limits", json={"requests_per_minute": 0})
    body = {"model": "smol", "training_file": world.file_id}
    wrong = [{**body, "model": "none"}, {**body, "rank": 1}]

    sent = [client.post(JOBS, json=one) for one in (*wrong, body, *wrong, {**body, "seed": 1}, {**body, "seed": 2})]

    assert [answer.status_code for answer in sent] == [404, 400, 200, 404, 400, 200, 429]
    assert "2 jobs per day" in error_of(sent[-1])["message"]
    assert 86_000 < int(sent[-1].headers["retry-after"]) <= 86_400
    assert sent[-1].headers["x-should-retry"] == "false"
    assert "x-ratelimit-limit-requests" not in sent[-1].headers


def test_daily_job_count_survives_a_restart(
    app: FastAPI, client: TestClient, operator: TestClient, key: str, world: World
) -> None:
    operator.post(f"/v1/api_keys/{key.split('_')[1]}/limits", json={"requests_per_minute": 0, "jobs_per_day": 1})
    body = {"model": "smol", "training_file": world.file_id}
    client.post(JOBS, json=body)

    app.state.services = replace(app.state.services, limits=Limits(ApiSettings()))

    assert client.post(JOBS, json={**body, "seed": 1}).status_code == 429


@pytest.mark.parametrize("retry_headers", [{"x-stainless-retry-count": "1"}, {"idempotency-key": "once"}])
def test_retried_submission_counts_once_and_succeeds_at_the_limit(
    client: TestClient, operator: TestClient, key: str, world: World, retry_headers: dict[str, str]
) -> None:
    operator.post(f"/v1/api_keys/{key.split('_')[1]}/limits", json={"requests_per_minute": 0, "jobs_per_day": 1})
    body = {"model": "smol", "training_file": world.file_id}

    first = client.post(JOBS, json=body, headers=retry_headers)
    again = [client.post(JOBS, json=body, headers=retry_headers) for _ in range(2)]

    assert {answer.json()["id"] for answer in again} == {first.json()["id"]}
    assert client.post(JOBS, json={**body, "seed": 1}).status_code == 429


def test_operator_sets_key_limits_that_derived_keys_inherit(
    app: FastAPI, client: TestClient, operator: TestClient, key: str
) -> None:
    path = f"/v1/api_keys/{key.split('_')[1]}"

    refused = client.post(f"{path}/limits", json={"requests_per_minute": 0})
    given = operator.post(f"{path}/limits", json={"requests_per_minute": 5, "jobs_per_day": 7}).json()
    later = operator.post(f"{path}/limits", json={"jobs_per_day": None}).json()
    made = client.post("/v1/api_keys", json={"name": "child"})
    freed = client.post("/v1/api_keys", json={"name": "child", "requests_per_minute": 0})

    highest = operator.post(f"{path}/limits", json={"highest_priority": "batch"}).json()

    assert (given["requests_per_minute"], given["jobs_per_day"]) == (5, 7)
    assert (later["requests_per_minute"], later["jobs_per_day"]) == (5, None)
    assert (highest["highest_priority"], highest["requests_per_minute"]) == ("batch", 5)
    assert [error_of(answer)["code"] for answer in (refused, freed)] == ["operator_required"] * 2
    assert made.json()["requests_per_minute"] == 5
    assert with_key(app, made.json()["value"]).get("/v1/files").headers["x-ratelimit-limit-requests"] == "5"


def test_without_a_limit_nothing_is_counted(app: FastAPI, client: TestClient, anonymous: TestClient) -> None:
    app.state.services = replace(app.state.services, limits=Limits(ApiSettings(requests_per_minute=0)))

    answers = [client.get("/v1/files") for _ in range(5)]
    refused = [anonymous.get("/v1/files").status_code for _ in range(FAILURES.limit + 1)]

    assert {answer.status_code for answer in answers} == {200}
    assert "x-ratelimit-limit-requests" not in answers[0].headers
    assert set(refused) == {401}


def test_default_limit_is_600_requests_per_minute_per_key(app: FastAPI, client: TestClient) -> None:
    app.state.services = replace(app.state.services, limits=Limits(ApiSettings()))

    assert client.get("/v1/files").headers["x-ratelimit-limit-requests"] == "600"


class Guesser:
    """Clients at several addresses of a service with default limits."""

    def __init__(self, app: FastAPI, manual_clock: ManualClock) -> None:
        self.app, self.manual_clock = app, manual_clock
        app.state.services = replace(app.state.services, limits=Limits(ApiSettings(), clock=manual_clock))

    def get(self, key: str | None, *, address: str = "192.0.2.1") -> Any:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        client = TestClient(self.app, base_url="http://127.0.0.1", headers=headers, client=(address, 50000))
        return client.get("/v1/files")

    def use_up(self, *, address: str = "192.0.2.1") -> None:
        answers = {self.get(f"lorry_key-{n}_x", address=address).status_code for n in range(FAILURES.limit)}
        assert answers == {401}


@pytest.fixture
def guesser(app: FastAPI, manual_clock: ManualClock) -> Guesser:
    return Guesser(app, manual_clock)


def test_address_with_many_wrong_keys_is_rejected_before_the_check(
    guesser: Guesser, anonymous: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    guesser.use_up()
    monkeypatch.setattr(authentication, "authenticate", lambda *_, **__: pytest.fail("the key was looked up"))

    refused = [guesser.get(key) for key in ("lorry_key-1_x", None)]

    assert [answer.status_code for answer in refused] == [429, 429]
    assert error_of(refused[0])["code"] == "rate_limit_exceeded"
    assert "The address 192.0.2.1 has reached the limit of 60 failed authentications" in error_of(refused[0])["message"]
    assert refused[0].headers["retry-after"] == "1"
    monkeypatch.undo()
    guesser.manual_clock.advance(1)
    assert guesser.get("lorry_key-1_x").status_code == 401


def test_known_valid_key_is_not_blocked_by_wrong_keys_of_its_address(
    guesser: Guesser, anonymous: TestClient, key: str, stranger_key: str
) -> None:
    assert guesser.get(key).status_code == 200
    guesser.use_up()

    assert guesser.get(key).status_code == 200
    assert guesser.get(key).status_code == 200


def test_unseen_valid_key_is_not_blocked_by_wrong_keys_of_its_address(
    guesser: Guesser, anonymous: TestClient, key: str
) -> None:
    guesser.use_up()

    assert guesser.get(key).status_code == 200
    assert guesser.get("wrong").status_code == 429
    assert guesser.get(new_key_text()).status_code == 429


def test_valid_link_and_session_are_not_blocked_by_wrong_keys(
    guesser: Guesser, app: FastAPI, services: Services, key: str
) -> None:
    guesser.use_up(address="127.0.0.1")
    token = authentication.create_sign_in_link(services.db, api_key_id=key.split("_")[1], pepper=services.pepper)
    origin = {"x-lorry-csrf": "1", "origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"}
    browser = TestClient(app, base_url="http://127.0.0.1", headers=origin, client=("127.0.0.1", 50000))

    opened = browser.post("/v1/sign_in_links/open", json={"token": token})

    assert opened.status_code == 200
    assert browser.get("/v1/files").status_code == 200


def test_concurrent_first_requests_with_valid_keys_are_accepted(manual_clock: ManualClock) -> None:
    """This happens after a restart, when the process has not seen any key."""
    limits = Limits(ApiSettings(), clock=manual_clock)
    secrets = [new_key_text() for _ in range(FAILURES.limit + 5)]

    async def check(secret: str, until: asyncio.Event) -> None:
        async with limits.guarding("192.0.2.1", secret):
            await until.wait()

    async def send_all() -> None:
        finished, at_once = asyncio.Event(), asyncio.Event()
        at_once.set()
        first = [asyncio.create_task(check(secret, finished)) for secret in secrets[: FAILURES.limit]]
        await asyncio.sleep(0)
        await asyncio.gather(*(check(secret, at_once) for secret in secrets[FAILURES.limit :]))
        finished.set()
        await asyncio.gather(*first)

    asyncio.run(send_all())


def test_concurrent_checks_beyond_the_failure_limit_are_bounded(guesser: Guesser, anonymous: TestClient) -> None:
    limits: Limits = guesser.app.state.services.limits
    guesser.use_up()
    running, most = 0, 0

    async def check() -> None:
        nonlocal running, most
        async with limits.guarding("192.0.2.1", new_key_text()):
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            raise Unauthorized(ErrorText(code="invalid_api_key", message="No.", remedy="None."), reason="unknown")

    async def flood() -> list[BaseException | None]:
        return await asyncio.gather(*(check() for _ in range(20)), return_exceptions=True)

    refusals = asyncio.run(flood())

    assert most == CHECKS_BEYOND_FAILURES
    assert [getattr(each, "code", None) for each in refusals] == ["rate_limit_exceeded"] * 20


def test_valid_requests_do_not_count_as_failures(
    guesser: Guesser, anonymous: TestClient, services: Services, world: World
) -> None:
    project_id = world.caller.project_id
    for _ in range(FAILURES.limit + 1):
        assert guesser.get(new_key(services, project_id)).status_code == 200

    assert guesser.get("wrong").status_code == 401


def test_revoked_key_counts_as_a_failure(
    guesser: Guesser, anonymous: TestClient, services: Services, world: World
) -> None:
    secret = new_key(services, world.caller.project_id)
    assert guesser.get(secret).status_code == 200
    end_key(services.db, secret.split("_")[1])

    answers = [guesser.get(secret).status_code for _ in range(FAILURES.limit + 2)]

    assert answers == [401] * FAILURES.limit + [429] * 2


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("192.0.2.1", "192.0.2.2", False),
    ],
)
def test_addresses_of_one_ipv6_network_share_a_limit(
    guesser: Guesser, anonymous: TestClient, one: str, other: str, is_same: bool
) -> None:
    guesser.use_up(address=one)

    answer = guesser.get("wrong", address=other)
    assert answer.status_code == (429 if is_same else 401)
    assert ("The network 2001:db8:0:1::/64 has reached" in answer.text) == is_same or ":" not in one


@pytest.mark.parametrize("way", ["preview", "open", "session"])
def test_invalid_sign_in_attempts_count_as_failures(
    guesser: Guesser, app: FastAPI, anonymous: TestClient, way: str
) -> None:
    guesser.use_up(address="127.0.0.1")
    origin = {"x-lorry-csrf": "1", "origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"}

    if way != "session":
        refused = anonymous.post(f"/v1/sign_in_links/{way}", json={"token": "guess"}, headers=origin)
    else:
        refused = anonymous.post("/v1/browser_session", json={"api_key": "guess"}, headers=origin)

    assert (refused.status_code, error_of(refused)["code"]) == (429, "rate_limit_exceeded")


def test_openai_client_honors_retry_after(
    site: Site, manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        manual_clock.advance(seconds)

    monkeypatch.setattr("openai._base_client.time", SimpleNamespace(sleep=sleep, time=time.time))
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key=site.key) as client:
        for _ in range(4):
            client.files.list()
        monkeypatch.setattr("openai._base_client.time", SimpleNamespace(sleep=slept.append, time=time.time))
        with pytest.raises(openai.RateLimitError) as refusal:
            client.files.list()

    assert slept == [20.0, 20.0, 20.0]
    assert refusal.value.code == "rate_limit_exceeded"


def test_sdk_honors_retry_after_but_does_not_wait_for_hours(
    site: Site, manual_clock: ManualClock, world: World
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        manual_clock.advance(seconds)

    with Lorry(site.url, site.key, sleep=sleep) as lorry:
        for _ in range(4):
            list(lorry.files.list())
        manual_clock.advance(60)
        for seed in range(2):
            lorry.jobs.create(model="smol", training_file=world.file_id, seed=seed)
        with pytest.raises(RateLimited, match="2 jobs per day"):
            lorry.jobs.create(model="smol", training_file=world.file_id, seed=2)

    assert slept == [20.0]


def test_number_of_buckets_is_bounded(manual_clock: ManualClock) -> None:
    buckets = Buckets(clock=manual_clock)
    buckets.take("spent", RATE, cost=3)

    for number in range(MAX_BUCKETS):
        buckets.take(f"key {number}", RATE, cost=0)

    assert buckets.num_buckets <= MAX_BUCKETS
    assert not buckets.take("spent", RATE).is_allowed


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (59.2, "1m0s"), (360, "6m0s"), (7200.5, "2h0m1s")],
)
def test_duration_has_openais_format(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
