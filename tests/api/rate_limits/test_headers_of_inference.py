"""Every answer of an inference route has the rate-limit headers of OpenAI's API, whatever its status."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.rate_limits.limits import Limits
from api.settings import ApiSettings
from tests.catalog.world import World

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
