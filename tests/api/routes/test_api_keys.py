"""/v1/projects and /v1/api_keys, over HTTP and through the SDK."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.deps import Services
from lorry import APIError, Lorry
from lorry.errors import AuthenticationFailed, PermissionDenied
from tests.api.conftest import with_key
from tests.api.site import Site, error_of
from tests.catalog.world import World


def test_key_text_is_shown_only_once(client: TestClient, app: FastAPI) -> None:
    made = client.post("/v1/api_keys", json={"name": "ci", "scopes": ["keys:read"]}).json()

    holder = with_key(app, made["value"])
    shown = [holder.get(f"/v1/api_keys/{made['id']}").json(), holder.get("/v1/api_keys").json()["data"][0]]

    assert shown[0] | {"last_used_at": None} == {name: made[name] for name in made if name != "value"}
    assert shown[0] == shown[1]
    assert made["redacted_value"] == f"lorry_{made['id']}_…{made['value'][-4:]}"
    assert (made["status"], made["scopes"], made["object"]) == ("active", ["keys:read"], "api_key")


def test_key_shows_when_it_was_last_used(client: TestClient, app: FastAPI) -> None:
    made = client.post("/v1/api_keys", json={"name": "ci"}).json()
    with_key(app, made["value"]).get("/v1/files")

    shown = client.get(f"/v1/api_keys/{made['id']}").json()

    assert made["last_used_at"] is None
    assert shown["last_used_at"] >= made["created_at"]


def test_key_list_is_paginated_and_omits_key_texts(client: TestClient) -> None:
    made = [client.post("/v1/api_keys", json={"name": f"n{number}"}).json() for number in range(3)]

    first = client.get("/v1/api_keys", params={"limit": 2}).json()
    second = client.get("/v1/api_keys", params={"limit": 2, "after": first["last_id"]}).json()

    assert [row["name"] for row in first["data"]] == ["n2", "n1"]
    assert second["data"][0]["name"] == "n0"
    assert first["has_more"] is True
    assert not any(one["value"] in str((first, second)) for one in made)


def test_invalid_key_request_names_the_field(client: TestClient) -> None:
    refused: list[tuple[dict[str, Any], str, str]] = [
        ({}, "name", "missing"),
        ({"name": ""}, "name", "at least 1"),
        ({"name": "a\nb"}, "name", "without control characters"),
        ({"name": "x", "scopes": ["jobs"]}, "scopes.0", "'jobs:read'"),
        ({"name": "x", "scopes": []}, "scopes", "at least 1 item long"),
        ({"name": "x", "expires_at": 5}, "expires_at", "not in the future"),
        ({"name": "x", "expires_at": 10**15}, "expires_at", "at most"),
        ({"name": "x", "operator": True}, "operator", "Did you mean 'is_operator'?"),
    ]

    for body, param, fragment in refused:
        error = error_of(client.post("/v1/api_keys", json=body))
        assert error["param"] == param
        assert fragment in error["message"]


def test_rotated_key_stays_valid_until_the_overlap_ends(client: TestClient, app: FastAPI) -> None:
    made = client.post("/v1/api_keys", json={"name": "ci"}).json()

    new = client.post(f"/v1/api_keys/{made['id']}/rotate", json={"overlap_seconds": 600}).json()
    old = client.get(f"/v1/api_keys/{made['id']}").json()

    assert [with_key(app, one["value"]).get("/v1/files").status_code for one in (made, new)] == [200, 200]
    assert (old["replaced_by"], old["status"]) == (new["id"], "active")
    assert 590 <= old["expires_at"] - new["created_at"] <= 600
    at_once = client.post(f"/v1/api_keys/{new['id']}/rotate", json={"overlap_seconds": 0}).json()
    assert [with_key(app, one["value"]).get("/v1/files").status_code for one in (new, at_once)] == [401, 200]
    assert client.get(f"/v1/api_keys/{new['id']}").json()["status"] == "expired"


def test_operator_creates_a_project_and_keys_with_the_sdk(
    app: FastAPI, site: Site, services: Services, operator_key: str, world: World
) -> None:
    with Lorry(site.url, operator_key) as lorry:
        project = lorry.projects.create("search")
        key = lorry.keys.create("first", project="search", scopes=["files:read", "keys:write"])
        renamed = lorry.projects.rename(project.id, "find")
        assert (project.weight, lorry.projects.weigh("find", 2.5).weight) == (1, 2.5)

        with Lorry(site.url, key.value) as theirs:
            assert [one.name for one in theirs.projects.list()] == ["find"]
            assert list(theirs.files.list()) == []
            with pytest.raises(PermissionDenied, match="jobs:read"):
                list(theirs.jobs.list())
            new = theirs.keys.rotate(key.id, overlap_seconds=0)
            with pytest.raises(AuthenticationFailed):
                list(theirs.files.list())
        with Lorry(site.url, new.value) as theirs:
            theirs.keys.revoke(new.id)
            with pytest.raises(AuthenticationFailed):
                list(theirs.files.list())

        assert {one.id: one.status for one in lorry.keys.list(project="find")} == {key.id: "expired", new.id: "revoked"}
        assert lorry.projects.archive("find").status == "archived"
        assert "find" not in {one.name for one in lorry.projects.list()}
        assert lorry.projects.restore(renamed.id).status == lorry.projects.get("find").status == "active"
        with pytest.raises(APIError) as last:
            lorry.keys.revoke(operator_key.split("_")[1])
    assert (last.value.status, last.value.code) == (409, "last_operator_key")


def test_repeated_creation_shows_no_secret_and_creates_no_second_key(client: TestClient, app: FastAPI) -> None:
    once = {"idempotency-key": "once", "x-stainless-retry-count": "1"}
    first = client.post("/v1/api_keys", json={"name": "ci"}, headers=once).json()
    before = client.get("/v1/api_keys").json()["data"]

    repeated = client.post("/v1/api_keys", json={"name": "ci"}, headers=once)

    assert (repeated.status_code, error_of(repeated)["code"]) == (409, "idempotency_key_reused")
    assert first["id"] in error_of(repeated)["message"]
    assert f"`lorry keys revoke {first['id']}`" in error_of(repeated)["message"]
    assert with_key(app, first["value"]).get("/v1/files").status_code == 200
    assert [row["id"] for row in client.get("/v1/api_keys").json()["data"]] == [row["id"] for row in before]


def test_repeated_rotation_shows_no_secret_and_creates_no_second_key(client: TestClient, app: FastAPI) -> None:
    once = {"idempotency-key": "once", "x-stainless-retry-count": "1"}
    old = client.post("/v1/api_keys", json={"name": "ci"}).json()
    new = client.post(f"/v1/api_keys/{old['id']}/rotate", headers=once).json()

    repeated = client.post(f"/v1/api_keys/{old['id']}/rotate", headers=once)

    assert (repeated.status_code, error_of(repeated)["code"]) == (409, "key_not_live")
    assert new["id"] in error_of(repeated)["message"]
    assert with_key(app, new["value"]).get("/v1/files").status_code == 200


def test_revocation_can_cancel_jobs_and_revoke_descendants(client: TestClient, app: FastAPI, world: World) -> None:
    made = client.post("/v1/api_keys", json={"name": "ci"}).json()
    holder = with_key(app, made["value"])
    child = holder.post("/v1/api_keys", json={"name": "child"}).json()
    job = {"model": "smol", "training_file": world.file_id}
    job_id = holder.post("/v1/fine_tuning/jobs", json=job).json()["id"]

    first = client.post(f"/v1/api_keys/{made['id']}/revoke").json()
    options = {"cancel": True, "with_descendants": True}
    second = client.post(f"/v1/api_keys/{made['id']}/revoke", json=options).json()

    names = ("status", "revoked_keys", "valid_descendants", "unfinished_jobs", "unfinished_sweeps")
    assert [first[name] for name in names] == ["revoked", [made["id"]], 1, 1, 0]
    assert [second[name] for name in names] == ["revoked", [made["id"], child["id"]], 0, 0, 0]
    assert client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["status"] == "cancelled"
    assert with_key(app, child["value"]).get("/v1/files").status_code == 401
    unknown = client.post(f"/v1/api_keys/{made['id']}/revoke", json={"all": True})
    assert (unknown.status_code, error_of(unknown)["param"]) == (400, "all")
