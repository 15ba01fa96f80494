"""Multipart uploads over HTTP: requests, limits and rejections."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.app import create_app
from api.deps import Services
from api.settings import ApiSettings
from catalog.settings import Settings
from catalog.storage import multipart_uploads
from tests.api.site import chat_lines, error_of

BODY_BYTES = 2**12
"""The limit of bodies other than upload parts."""
CONTENT = chat_lines(4)
ANNOUNCED = {"bytes": len(CONTENT), "filename": "a.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}


@pytest.fixture
def app(settings: Settings) -> Iterator[FastAPI]:
    app = create_app(settings, ApiSettings(max_body_bytes=BODY_BYTES))
    yield app
    app.state.services.db.close()


def begin(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/uploads", json={**ANNOUNCED, **fields})


def add(client: TestClient, upload_id: str, content: bytes) -> Any:
    return client.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("upload", content)})


def test_completed_upload_becomes_a_file(client: TestClient, services: Services) -> None:
    lifetime = {"anchor": "created_at", "seconds": 3600}
    begun = begin(client, expires_after=lifetime).json()
    parts = [add(client, begun["id"], content).json() for content in (CONTENT[:100], CONTENT[100:])]

    done = client.post(f"/v1/uploads/{begun['id']}/complete", json={"part_ids": [part["id"] for part in parts]}).json()

    assert (begun["object"], begun["status"], begun["file"]) == ("upload", "pending", None)
    assert begun["expires_at"] - begun["created_at"] == 3600
    assert {(part["object"], part["upload_id"]) for part in parts} == {("upload.part", begun["id"])}
    assert done == {**begun, "status": "completed", "file": client.get(f"/v1/files/{done['file']['id']}").json()}
    assert done["file"]["expires_at"] == done["file"]["created_at"] + 3600
    assert client.get(f"/v1/files/{done['file']['id']}/content").content == CONTENT
    assert not list((services.settings.data_dir / "spool").glob("*"))


@pytest.mark.parametrize(
    ("fields", "param", "fragment"),
    [
        ({"bytes": 2**21}, "bytes", "LORRY_MAX_FILE_BYTES"),
        ({"bytes": "many"}, "bytes", "a whole number"),
        ({"purpose": "assistants"}, "purpose", "fine-tune"),
        ({"filename": ""}, "filename", "at least 1 character"),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, "expires_after.seconds", "at least 3600"),
        ({"part_size": 5}, "part_size", "part_size"),
    ],
)
def test_invalid_upload_announcement_is_rejected(
    client: TestClient, fields: dict[str, Any], param: str, fragment: str
) -> None:
    error = error_of(begin(client, **fields))

    assert (error["param"], fragment in error["message"]) == (param, True), error


def test_part_size_limit_exceeds_the_body_limit(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart_uploads, "MAX_PART_BYTES", 2 * BODY_BYTES)
    upload_id = begin(client).json()["id"]

    accepted, refused = (add(client, upload_id, b"x" * (2 * BODY_BYTES + more)) for more in (0, 1))
    other = client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": ["x" * BODY_BYTES]})

    assert accepted.status_code == 200, accepted.text
    assert (refused.status_code, other.status_code) == (413, 413)
    assert (error_of(refused)["code"], error_of(refused)["param"]) == ("file_too_large", "data")


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"files": {"file": ("x", b"1")}}, "file"),
        ({"files": {"data": ("x", b"1")}, "data": {"purpose": "fine-tune"}}, "purpose"),
        ({"json": {"data": "x"}}, "data"),
    ],
)
def test_invalid_part_form_is_rejected(client: TestClient, form: dict[str, Any], param: str) -> None:
    upload_id = begin(client).json()["id"]

    error = error_of(client.post(f"/v1/uploads/{upload_id}/parts", **form))

    assert error["param"] == param
    assert "'data'" in error["message"]


def test_parts_of_cancelled_or_unknown_uploads_are_rejected_unread(client: TestClient, services: Services) -> None:
    upload_id = begin(client).json()["id"]
    assert client.post(f"/v1/uploads/{upload_id}/cancel").json()["status"] == "cancelled"

    over, unknown = add(client, upload_id, b"x"), add(client, "upload-none", b"x")
    cancelled = client.post(f"/v1/uploads/{upload_id}/cancel")

    assert (over.status_code, error_of(over)["code"]) == (409, "invalid_transition")
    assert over.headers["x-should-retry"] == "false"
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "upload_not_found")
    assert (cancelled.status_code, error_of(cancelled)["code"]) == (409, "invalid_transition")
    again = client.post(f"/v1/uploads/{upload_id}/cancel", headers={"x-stainless-retry-count": "1"})
    assert again.json()["status"] == "cancelled"
    assert not (services.settings.data_dir / "store" / "blobs").exists()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "part_ids"),
        ({"part_ids": []}, "part_ids"),
        ({"part_ids": ["part-x"], "md5": "no digest"}, "md5"),
        ({"part_ids": ["part-x"]}, "part_ids"),
    ],
)
def test_completion_without_valid_parts_is_rejected(client: TestClient, body: dict[str, Any], param: str) -> None:
    upload_id = begin(client).json()["id"]

    assert error_of(client.post(f"/v1/uploads/{upload_id}/complete", json=body))["param"] == param


def test_completion_with_a_wrong_md5_creates_no_file(client: TestClient) -> None:
    upload_id = begin(client).json()["id"]
    part = add(client, upload_id, CONTENT).json()["id"]
    path = f"/v1/uploads/{upload_id}/complete"

    refused = client.post(path, json={"part_ids": [part], "md5": hashlib.md5(b"other").hexdigest()})
    done = client.post(path, json={"part_ids": [part], "md5": hashlib.md5(CONTENT).hexdigest()})

    assert (refused.status_code, error_of(refused)["code"]) == (400, "upload_incomplete")
    assert done.json()["status"] == "completed"
