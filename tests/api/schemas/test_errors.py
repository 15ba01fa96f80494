"""Every error has OpenAI's shape, a remedy and a request id, and reveals no internals."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.deps import Services
from catalog.errors import Unavailable
from tests.api.site import SAME_ORIGIN, error_of, new_token
from tests.catalog.world import World


def test_unknown_route_names_the_nearest_one(client: TestClient) -> None:
    response = client.get("/v1/fine_tuning/job")

    assert response.status_code == 404
    error = error_of(response)
    assert error["code"] == "unknown_route"
    assert "/v1/fine_tuning/jobs" in error["message"]


@pytest.mark.parametrize(("path", "allowed"), [("/v1/files", "GET, POST"), ("/v1/models/smol", "DELETE, GET")])
def test_wrong_method_error_lists_the_allowed_methods(client: TestClient, path: str, allowed: str) -> None:
    response = client.patch(path)

    assert response.status_code == 405
    assert response.headers["allow"] == allowed
    assert f"Use {allowed.replace(', ', ' or ')} instead." in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/v1/files/../../etc/passwd", "/%2e%2e/secret", "/v1/files/a%00b", "/\ud7ff"])
def test_invalid_path_returns_the_standard_error(client: TestClient, path: str) -> None:
    response = client.get(path)

    assert response.status_code in (400, 404)
    error_of(response)


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        (b'{"model":', "not valid JSON"),
        (b"{\xff\xfe}", "is not UTF-8 text: byte 1 is invalid"),
        (b"[" * 100_000, "nested too deeply: it has more than 64 levels"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "integer with more than 4,300 digits"),
        (b'{"model": "\\ud800", "training_file": "x"}', ""),
        (b'{"\\ud800": 1}', ""),
        (b"null", ""),
        (b"", ""),
    ],
    ids=["cut off", "not UTF-8", "100,000 deep", "huge number", "lone surrogate", "odd name", "null", "empty"],
)
def test_malformed_body_is_rejected(client: TestClient, body: bytes, fragment: str) -> None:
    response = client.post("/v1/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})

    assert response.status_code == 400
    assert fragment in error_of(response)["message"]


@pytest.mark.parametrize("depth", [64, 65, *range(900, 1000, 2)])
def test_bodies_with_more_than_64_levels_are_rejected(client: TestClient, depth: int) -> None:
    body = b'{"model": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    response = client.post("/v1/fine_tuning/jobs", content=body, headers={"content-type": "application/json"})

    error = error_of(response)
    assert response.status_code == 400
    assert error["code"] == ("invalid_json" if depth > 64 else "invalid_value")
    assert ("nested too deeply" in error["message"]) == (depth > 64)


@pytest.mark.parametrize(
    ("fields", "code", "param", "fragment"),
    [
        (b'"seed": 1, "seed": 2', "invalid_json", "seed", "'seed' appears more"),
        (b'"lora": {"rank": 1, "rank": 2}', "invalid_json", "lora.rank", "'lora.rank' appears more"),
        (b'"optimizer": {"eps": NaN}', "invalid_row", "optimizer.eps", "'optimizer.eps' is NaN"),
        (b'"optimizer": {"eps": -Infinity}', "invalid_row", "optimizer.eps", "is -Infinity"),
        (b'"optimizer": {"eps": 1e999}', "invalid_row", "optimizer.eps", "'optimizer.eps' is 1e999"),
        (b'"seed": [[1, 1e999], NaN]', "invalid_row", "seed.0.1", "'seed.0.1' is 1e999"),
    ],
)
def test_ambiguous_json_is_rejected(
    client: TestClient, world: World, fields: bytes, code: str, param: str, fragment: str
) -> None:
    content = b'{"model": "smol", "training_file": "%s", %s}' % (world.file_id.encode(), fields)

    response = client.post("/v1/fine_tuning/jobs", content=content, headers={"content-type": "application/json"})

    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)
    assert fragment in error["message"]


def test_oversized_body_is_rejected_with_or_without_content_length(client: TestClient) -> None:
    def chunks() -> Any:
        for _ in range(20):
            yield b" " * 2**17

    declared = client.post("/v1/fine_tuning/jobs", content=b" " * (2**20 + 1))
    undeclared = client.post("/v1/fine_tuning/jobs", content=chunks(), headers={"content-type": "application/json"})

    for response in (declared, undeclared):
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"
    assert "has 1,048,577 bytes, but the maximum is 1,048,576 bytes" in error_of(declared)["message"]


def test_crash_response_has_only_a_request_id(
    app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("the-inside-of-lorry")

    monkeypatch.setattr("api.routes.files.files.list_page", crash)

    response = client.get("/v1/files")

    assert response.status_code == 500
    error = error_of(response)
    assert "the-inside-of-lorry" not in response.text
    assert response.headers["x-request-id"] in error["message"]
    assert response.headers["x-request-id"] in caplog.text
    assert "the-inside-of-lorry" in caplog.text


def test_unavailable_database_returns_503_with_retry_after(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise Unavailable("database_unavailable")

    monkeypatch.setattr("api.routes.files.files.list_page", away)

    response = client.get("/v1/files")

    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert error_of(response)["code"] == "database_unavailable"


def test_dns_rebinding_host_is_rejected(client: TestClient) -> None:
    response = client.get("/v1/files", headers={"host": "evil.example"})

    assert response.status_code == 421
    assert "LORRY_ALLOWED_HOSTS" in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/v1/files", "/nope", "/dashboard/", "/healthz", "/"])
def test_every_response_has_security_headers(client: TestClient, path: str) -> None:
    response = client.get(path)

    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    scripts = [part.strip() for part in policy.split(";") if part.strip().startswith("script-src")]
    assert scripts == (["script-src 'self'"] if path in ("/", "/dashboard/") else [])  # / redirects there
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


def test_root_redirects_to_the_dashboard(anonymous: TestClient) -> None:
    for path in ("/", "/dashboard"):
        response = anonymous.get(path)

        assert (response.status_code, response.headers["location"]) == (307, "/dashboard/")


def test_only_dashboard_files_are_served_from_its_folder(anonymous: TestClient) -> None:
    assert anonymous.get("/dashboard/").text.startswith("<!doctype html>")
    assert anonymous.get("/dashboard/index.html").headers["cache-control"] == "no-cache"
    for path in ("/dashboard/__init__.py", "/dashboard/../api/app.py", "/dashboard/%2e%2e/pyproject.toml"):
        assert anonymous.get(path).status_code == 404


def test_secrets_are_not_logged(
    services: Services, anonymous: TestClient, client: TestClient, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = new_token(client)

    anonymous.post("/v1/sign_in_links/preview", json={"token": token})
    anonymous.post("/v1/sign_in_links/open", json={"token": token}, headers=SAME_ORIGIN)
    anonymous.get("/v1/files", headers={"authorization": "Bearer lorry_key-abc_wrong-canary"})
    client.get("/v1/files", params={"after": "x"})

    logged = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("lorry"))
    assert "path=/v1/sign_in_links/open status=200" in logged.replace(" method=POST", "")
    for secret in (key, token, "wrong-canary", anonymous.cookies["lorry_session"]):
        assert secret not in logged


@pytest.mark.parametrize("path", ["organization/audit_logs", "organization/usage/completions", "organization/projects"])
def test_openai_administration_routes_suggest_lorrys_routes(client: TestClient, path: str) -> None:
    answer = client.get(f"/v1/{path}")

    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_supported")
    assert f"There is no route GET /v1/{path}. OpenAI's administration API" in error_of(answer)["message"]
    assert "/v1/audit_events" in error_of(answer)["remedy"]
