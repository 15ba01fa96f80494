"""Routes require a key or a browser session, and the resources of other projects are not found."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.app import create_app
from api.deps import Services
from api.settings import ApiSettings
from catalog.db.database import read_clock
from catalog.errors import Unauthorized
from catalog.settings import Settings
from catalog.tenancy import authentication
from tests.api.site import SAME_ORIGIN, error_of, new_token, open_link
from tests.catalog.world import World, end_key

OPEN_PATHS = {
    "/healthz",
    "/readyz",
    "/metrics",
    *("/v1/browser_session", "/v1/sign_in_links/preview", "/v1/sign_in_links/open"),
    "/v1/service_identity",
    "/v1/keys.json",
}


def test_every_route_except_open_ones_requires_a_key(app: FastAPI, anonymous: TestClient) -> None:
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            if path in OPEN_PATHS:
                continue
            filled = path.replace("{", "").replace("}", "")

            response = anonymous.request(method, filled, json={"name": "x", "kind": "hub", "source": "y"})

            assert response.status_code in (401, 400), (method, path, response.text)
            if (
                response.status_code == 400
            ):  # the body is validated before authentication, and the request has no effect
                assert error_of(response)["type"] == "invalid_request_error"
            else:
                assert response.headers["www-authenticate"] == 'Bearer realm="lorry"'
                assert error_of(response)["type"] == "authentication_error"


@pytest.mark.parametrize("secret", ["x", "lorry_key-123_abc", "lorry_" + "x" * 2000, "sk-proj-1"])
def test_wrong_key_is_rejected(anonymous: TestClient, secret: str) -> None:
    response = anonymous.get("/v1/files", headers={"authorization": f"Bearer {secret}"})

    assert response.status_code == 401
    assert error_of(response)["code"] == "invalid_api_key"


def test_expired_and_revoked_keys_are_rejected(services: Services, world: World, anonymous: TestClient) -> None:
    with services.db.read() as session:
        now = read_clock(session)
    project_id = world.caller.project_id
    _, expired = authentication.create(
        services.db, project_id=project_id, name="old", pepper=services.pepper, expires_at=now - 1
    )
    row, revoked = authentication.create(services.db, project_id=project_id, name="gone", pepper=services.pepper)
    end_key(services.db, row.id)

    for secret in (expired, revoked):
        response = anonymous.get("/v1/files", headers={"authorization": f"Bearer {secret}"})

        assert response.status_code == 401


def test_rejection_reason_is_logged_and_counted_but_hidden_from_client(
    services: Services, world: World, anonymous: TestClient, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    with services.db.read() as session:
        now = read_clock(session)
    db, pepper, project_id = services.db, services.pepper, world.caller.project_id
    old, expired = authentication.create(db, project_id=project_id, name="old", pepper=pepper, expires_at=now - 1)
    gone, revoked = authentication.create(db, project_id=project_id, name="gone", pepper=pepper)
    end_key(db, gone.id)
    cases = {
        "malformed": ("sk-proj-1", "-"),
        "unknown": (key[:-1] + ("a" if key[-1] != "a" else "b"), "-"),
        "expired": (expired, old.id),
        "revoked": (revoked, gone.id),
    }
    caplog.set_level("INFO", logger="lorry.api")

    answers = {
        reason: anonymous.get("/v1/files", headers={"authorization": f"Bearer {secret}"})
        for reason, (secret, _) in cases.items()
    }
    anonymous.get("/v1/files")
    anonymous.get("/v1/files", headers={"cookie": "lorry_session=ended"})

    assert len({response.text for response in answers.values()}) == 1
    lines = [line for line in caplog.messages if "path=/v1/files" in line]
    for line, (reason, (_, key_id)) in zip(lines, cases.items(), strict=False):
        assert f" key={key_id} project=- address=127.0.0.1 rejected={reason}" in line
    registry = services.telemetry.registry
    for reason in (*cases, "missing", "session_ended"):
        assert registry.get_sample_value("lorry_http_rejected_keys_total", {"reason": reason}) == 1, reason


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({}, "The request contains no API key."),
        ({"authorization": "lorry_key-1_secret"}, "not in the form `Bearer YOUR_KEY`"),
        ({"authorization": "Basic bG9ycnk="}, "not in the form `Bearer YOUR_KEY`"),
    ],
)
def test_missing_key_is_distinguished_from_a_header_without_bearer(
    anonymous: TestClient, headers: dict[str, str], problem: str
) -> None:
    response = anonymous.get("/v1/files", headers=headers)

    assert (response.status_code, error_of(response)["code"]) == (401, "missing_api_key")
    assert problem in error_of(response)["message"]
    assert "secret" not in response.text


@pytest.mark.parametrize("kind", ["organization", "project"])
def test_openai_headers_must_name_the_keys_project_and_organization(
    client: TestClient, world: World, kind: str
) -> None:
    for own in (getattr(world.caller, f"{kind}_id"), getattr(world.caller, f"{kind}_name"), ""):
        assert client.get("/v1/files", headers={f"openai-{kind}": own}).status_code == 200

    response = client.get("/v1/files", headers={f"openai-{kind}": "other"})

    assert (response.status_code, error_of(response)["code"]) == (401, "mismatched_project")
    own_name, own_id = (getattr(world.caller, f"{kind}_{what}") for what in ("name", "id"))
    error = error_of(response)
    assert f"header is 'other', but the API key belongs to the {kind} {own_name!r} ({own_id})." in error["message"]
    assert f"set it to {own_id}" in error["remedy"]
    assert "openai-organization" not in response.headers


def test_sign_in_link_works_once(client: TestClient, anonymous: TestClient) -> None:
    body = {"token": new_token(client)}

    shown = anonymous.post("/v1/sign_in_links/preview", json=body)
    first = anonymous.post("/v1/sign_in_links/open", json=body, headers=SAME_ORIGIN)
    second = anonymous.post("/v1/sign_in_links/open", json=body, headers=SAME_ORIGIN)

    assert (shown.json()["project"], shown.json()["key_name"]) == ("ours", "test")
    assert "set-cookie" not in shown.headers
    assert first.json()["project"] == "ours"
    cookie = first.headers["set-cookie"].lower()
    assert cookie.startswith("lorry_session=")
    assert all(part in cookie for part in ("httponly", "samesite=strict", "path=/"))
    assert (second.status_code, error_of(second)["code"]) == (401, "invalid_sign_in_link")
    assert anonymous.post("/v1/sign_in_links/preview", json=body).status_code == 401
    assert anonymous.get("/v1/browser_session").json()["project"] == "ours"


@pytest.mark.parametrize("headers", [{}, {"x-lorry-csrf": "1", "origin": "http://evil.example"}])
def test_other_origins_cannot_sign_in_a_browser(
    client: TestClient, anonymous: TestClient, headers: dict[str, str]
) -> None:
    """Covers navigation (no GET route signs in), forms and scripts."""
    token = new_token(client)

    navigated = anonymous.get(f"/dashboard/?token={token}")
    posted = anonymous.post("/v1/sign_in_links/open", json={"token": token}, headers=headers)

    assert "set-cookie" not in navigated.headers
    assert (posted.status_code, error_of(posted)["code"]) == (403, "cross_site_request")
    assert anonymous.post("/v1/sign_in_links/preview", json={"token": token}).status_code == 200


def test_link_of_another_key_replaces_session_only_with_consent(
    client: TestClient, stranger: TestClient, anonymous: TestClient, services: Services
) -> None:
    open_link(anonymous, client)
    mine = anonymous.cookies["lorry_session"]
    body = {"token": new_token(stranger)}

    refused = anonymous.post("/v1/sign_in_links/open", json=body, headers=SAME_ORIGIN)
    assert (refused.status_code, error_of(refused)["code"]) == (409, "already_exists")
    assert anonymous.get("/v1/browser_session").json()["project"] == "ours"
    assert open_link(anonymous, client).status_code == 200, "the same key needs no consent"

    replaced = anonymous.post("/v1/sign_in_links/open", json={**body, "replaces_session": True}, headers=SAME_ORIGIN)

    assert replaced.json()["project"] == "theirs"
    with pytest.raises(Unauthorized):
        authentication.authenticate_browser(services.db, secret=mine, pepper=services.pepper)


def test_link_of_revoked_key_is_rejected(services: Services, world: World, anonymous: TestClient) -> None:
    row, _ = authentication.create(services.db, project_id=world.caller.project_id, name="gone", pepper=services.pepper)
    token = authentication.create_sign_in_link(services.db, api_key_id=row.id, pepper=services.pepper)
    end_key(services.db, row.id)

    for path in ("preview", "open"):
        response = anonymous.post(f"/v1/sign_in_links/{path}", json={"token": token}, headers=SAME_ORIGIN)
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_sign_in_link")


def test_https_session_uses_host_prefixed_cookie(settings: Settings, world: World, key: str) -> None:
    app = create_app(settings, ApiSettings(public_url="https://lorry.example"), further_hosts=["lorry.example"])
    origin = {**SAME_ORIGIN, "origin": "https://lorry.example"}
    with TestClient(app, base_url="https://lorry.example") as browser:
        signed_in = browser.post("/v1/browser_session", json={"api_key": key}, headers=origin)

        cookie = signed_in.headers["set-cookie"]
        secret = browser.cookies["__Host-lorry_session"]
        assert cookie.startswith("__Host-lorry_session=")
        assert {"Secure", "Path=/", "HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))
        assert "domain" not in cookie.lower()
        assert browser.get("/v1/browser_session").json()["project"] == "ours"

        signed_out = browser.delete("/v1/browser_session", headers=origin)
        assert signed_out.headers["set-cookie"].startswith('__Host-lorry_session=""')
        assert "Secure" in signed_out.headers["set-cookie"]

        again = browser.post("/v1/browser_session", json={"api_key": key}, headers=origin)
        assert again.status_code == 200
        planted = browser.cookies["__Host-lorry_session"]
        browser.cookies.clear()
        assert secret != planted
        under_the_plain_name = browser.get("/v1/browser_session", headers={"cookie": f"lorry_session={planted}"})
        assert under_the_plain_name.status_code == 401


def test_browser_signs_in_with_a_key_and_signs_out(anonymous: TestClient, key: str) -> None:
    signed_in = anonymous.post("/v1/browser_session", json={"api_key": key}, headers=SAME_ORIGIN)
    assert signed_in.json()["is_operator"] is False
    assert anonymous.get("/v1/files").status_code == 200

    signed_out = anonymous.delete("/v1/browser_session", headers=SAME_ORIGIN)

    assert signed_out.json()["deleted"] is True
    assert anonymous.get("/v1/files").status_code == 401


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "does not contain the header `X-Lorry-Csrf: 1`"),
        ({"x-lorry-csrf": "1"}, "neither an Origin header nor a Sec-Fetch-Site header"),
        ({"origin": "http://127.0.0.1"}, "does not contain the header `X-Lorry-Csrf: 1`"),
        (
            {"x-lorry-csrf": "1", "origin": "http://evil.example"},
            "the Origin header is 'http://evil.example', but the Host header is '127.0.0.1'",
        ),
        ({"x-lorry-csrf": "1", "origin": "http://127.0.0.1:9999"}, "Origin header is 'http://127.0.0.1:9999'"),
        ({"x-lorry-csrf": "1", "sec-fetch-site": "cross-site"}, "Sec-Fetch-Site header is 'cross-site'"),
        (
            {"x-lorry-csrf": "1", "origin": "http://127.0.0.1", "sec-fetch-site": "same-site"},
            "Sec-Fetch-Site header is 'same-site'",
        ),
        ({"x-lorry-csrf": "1", "origin": "null"}, "Origin header is 'null'"),
    ],
)
def test_cookie_authenticated_change_requires_csrf_proof(
    anonymous: TestClient, key: str, world: World, headers: dict[str, Any], reason: str
) -> None:
    job = world.submit()
    anonymous.post("/v1/browser_session", json={"api_key": key}, headers=SAME_ORIGIN)

    forged = anonymous.post(f"/v1/fine_tuning/jobs/{job.id}/cancel", headers=headers)
    also = anonymous.post("/v1/browser_session", json={"api_key": key}, headers=headers)

    for response in (forged, also):
        assert response.status_code == 403
        assert error_of(response)["code"] == "cross_site_request"
        assert reason in error_of(response)["message"]
    own = anonymous.post(f"/v1/fine_tuning/jobs/{job.id}/cancel", headers=SAME_ORIGIN)
    assert own.json()["status"] == "cancelled"


def test_only_operators_add_models_and_list_all_projects(
    client: TestClient, operator: TestClient, world: World
) -> None:
    world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))
    body = {"name": "other", "kind": "hub", "source": "org/other"}

    refused = [client.post("/v1/models", json=body), client.get("/v1/queue", params={"all": "true"})]

    assert [response.status_code for response in refused] == [403, 403]
    assert error_of(refused[0])["type"] == "permission_error"
    assert operator.post("/v1/models", json=body).json()["state"] == "importing"
    assert len(operator.get("/v1/queue", params={"all": "true"}).json()["jobs"]) == 1
    assert operator.get("/v1/queue").json()["jobs"] == []
