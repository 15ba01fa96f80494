"""File uploads are streamed, bounded and validated, and a rejected upload leaves no trace."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from starlette.requests import Request
from starlette.testclient import TestClient

from api.deps import Services
from api.middleware import http as bodies
from api.transfers import file_upload
from catalog.settings import Settings
from tests.api.site import CHAT, Site, chat_lines, error_of

BOUNDARY = "b0undary"
MULTIPART = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def upload(client: TestClient, content: bytes, *, name: str = "train.jsonl", purpose: str = "fine-tune") -> Any:
    return client.post("/v1/files", data={"purpose": purpose}, files={"file": (name, content)})


def part(name: str, content: bytes, *, filename: str | None = None) -> bytes:
    disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
    return f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


def stored(settings: Settings) -> list[Path]:
    return [path for path in (settings.data_dir / "store").rglob("*") if path.is_file()]


def nothing_is_left(services: Services, client: TestClient) -> bool:
    spooled = list((services.settings.data_dir / "spool").glob("*"))
    return not spooled and not stored(services.settings) and len(client.get("/v1/files").json()["data"]) == 1


def test_uploaded_file_can_be_read_back_listed_and_deleted(client: TestClient, services: Services) -> None:
    content = chat_lines(3)

    made = upload(client, content).json()

    assert (made["bytes"], made["rows"], made["purpose"], made["status"]) == (len(content), 3, "fine-tune", "processed")
    assert made["digest"] == hashlib.sha256(content).hexdigest()
    read = client.get(f"/v1/files/{made['id']}/content")
    assert read.content == content
    assert read.headers["content-disposition"].startswith('attachment; filename="train.jsonl"')
    assert read.headers["content-length"] == str(len(content))
    assert client.get(f"/v1/files/{made['id']}").json() == made
    assert client.get("/v1/files").json()["data"][0] == made
    assert client.delete(f"/v1/files/{made['id']}").json() == {"id": made["id"], "object": "file", "deleted": True}
    assert client.get(f"/v1/files/{made['id']}").status_code == 404
    assert not list((services.settings.data_dir / "spool").glob("*"))


@pytest.mark.parametrize("cut", [1, 7, 64, 4096])
def test_form_is_parsed_at_any_chunk_boundaries(client: TestClient, cut: int) -> None:
    content = chat_lines(5) + json.dumps({**CHAT}).encode().replace(b"2", b"--" + BOUNDARY.encode()) + b"\n"
    body = part("purpose", b"fine-tune") + part("file", content, filename="x.jsonl") + END

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), cut):
            yield body[start : start + cut]

    made = client.post("/v1/files", content=chunks(), headers=MULTIPART).json()

    assert made["digest"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "empty"),
        (b"hello\n", "line 1"),
        (chat_lines(2) + b"{nonsense}\n" + chat_lines(2), "line 3"),
        (b'{"messages": [{"role": "user", "content": "only a question"}]}\n', "assistant"),
        (b'{"messages": ' + b"[" * 60_000 + b"]" * 60_000 + b"}\n", "line 1"),
        (b'{"messages": [], "messages": []}\n', "line 1"),
        (b"x" * 2**17, "line 1"),
    ],
    ids=["empty", "not JSONL", "one bad line", "no assistant turn", "deep", "duplicate key", "long line"],
)
def test_invalid_data_set_error_names_the_line(
    client: TestClient, services: Services, content: bytes, fragment: str
) -> None:
    response = upload(client, content)

    assert response.status_code == 400, response.text
    error = error_of(response)
    assert fragment in error["message"].lower()
    assert error["param"] == "file"
    assert nothing_is_left(services, client)


def test_oversized_file_is_rejected_during_the_upload(client: TestClient, services: Services) -> None:
    limit = services.settings.max_file_bytes
    head = part("purpose", b"fine-tune") + part("file", b"", filename="x")[:-2]
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield head
        while sent < bodies.DRAIN_BYTES * 2:
            sent += 2**16
            yield b"x" * 2**16

    undeclared = client.post("/v1/files", content=endless(), headers=MULTIPART)
    lying = client.post("/v1/files", content=head, headers={**MULTIPART, "content-length": str(limit * 10)})

    for response in (undeclared, lying):
        assert response.status_code == 413
        error = error_of(response)
        assert f"{limit:,} bytes" in error["message"]
        assert error["code"] == "file_too_large"
    assert nothing_is_left(services, client)


def test_file_size_limit_is_exact(client: TestClient, services: Services) -> None:
    row = chat_lines(1)
    rows = row * (services.settings.max_file_bytes // len(row) - 1)
    last = json.dumps({"messages": [*CHAT["messages"], {"role": "user", "content": ""}]}).encode()
    content = rows + last[:-4] + b" " * (services.settings.max_file_bytes - len(rows) - len(last)) + last[-4:]
    assert len(content) == services.settings.max_file_bytes

    assert upload(client, content).status_code == 200
    one_more = upload(client, content + b" ")
    assert (one_more.status_code, error_of(one_more)["code"]) == (413, "file_too_large")


@pytest.mark.parametrize(
    ("body", "param", "fragment"),
    [
        (part("file", chat_lines(1), filename="x") + END, "purpose", "missing"),
        (part("purpose", b"fine-tune") + END, "file", "missing"),
        (part("purpose", b"assistants") + part("file", chat_lines(1), filename="x") + END, "purpose", "fine-tune"),
        (part("purpose", b"fine-tune") + part("file", b"x") + END, "file", "filename"),
        (part("purposes", b"fine-tune") + END, "purposes", "Did you mean 'purpose'?"),
        (part("expires_after", b"created_at") + END, "expires_after", "Did you mean 'expires_after[anchor]'?"),
        (part("purpose", b"a") + part("purpose", b"b") + END, "purpose", "more than once"),
        (part("file", b"", filename="x") + part("file", b"", filename="y") + END, "file", "more than once"),
        (part("purpose", b"x" * 5000) + END, "purpose", "limit of 4,096 bytes"),
        (part("purpose", b"fine-tune") + part("file", chat_lines(1), filename="x"), "file", "closing boundary"),
        (b"no form at all", "file", "not a valid multipart form: the error is near byte 0"),
        (part("purpose", b"a") + b"--b0undary\r\nan invalid header: x", "file", "the error is near byte 79"),
    ],
)
def test_invalid_upload_form_is_rejected(
    client: TestClient, services: Services, body: bytes, param: str, fragment: str
) -> None:
    response = client.post("/v1/files", content=body, headers=MULTIPART)

    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"] == param
    assert fragment in error["message"]
    assert nothing_is_left(services, client)


@pytest.mark.parametrize(
    ("body", "remedy"),
    [
        (part("purpose", b"x" * 5000) + END, "Shorten 'purpose' to at most 4,096 bytes."),
        (part("purpose", b"a") + part("purpose", b"b") + END, "Send 'purpose' only once."),
        (part("purpose", b"fine-tune") + part("file", b"x", filename="x"), "Upload the file again. If this recurs,"),
    ],
)
def test_remedy_fits_the_problem_of_the_form(client: TestClient, body: bytes, remedy: str) -> None:
    response = client.post("/v1/files", content=body, headers=MULTIPART)

    assert error_of(response)["remedy"].startswith(remedy)


def test_json_upload_error_names_multipart_form_data(client: TestClient) -> None:
    response = client.post("/v1/files", json={"purpose": "fine-tune"})

    assert response.status_code == 400
    expected = "The Content-Type header is 'application/json', but uploads require multipart/form-data"
    assert expected in error_of(response)["message"]


@pytest.mark.parametrize("num_extra", [0, 2**17])
def test_too_large_upload_is_rejected_with_the_size_of_the_request(
    client: TestClient, services: Services, num_extra: int
) -> None:
    maximum = services.settings.max_file_bytes

    error = error_of(upload(client, b"x" * (maximum + 1 + num_extra)))

    shown = "exceeds the limit of" if num_extra == 0 else "a file can have at most"
    assert f"{shown} {maximum:,} bytes" in error["message"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "C:\\x\\train.jsonl", "a\u202eb.jsonl", "naïve.jsonl", "x" * 900])
def test_filename_is_a_label_and_never_a_path(client: TestClient, name: str) -> None:
    made = upload(client, chat_lines(1), name=name).json()

    assert "/" not in made["filename"]
    assert "\\" not in made["filename"]
    assert made["filename"].isprintable()
    assert client.get(f"/v1/files/{made['id']}/content").status_code == 200


def test_full_spool_disk_leaves_no_files(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_full_disk(path: Path) -> BinaryIO:
        path.touch()
        return os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb", buffering=0)

    monkeypatch.setattr(file_upload, "open_new", on_a_full_disk)

    response = upload(client, chat_lines(10_000))

    assert response.status_code == 507
    assert response.headers["x-should-retry"] == "false"
    assert error_of(response)["code"] == "out_of_space"
    assert nothing_is_left(services, client)


def test_large_upload_is_not_held_in_memory(tmp_path: Path) -> None:
    chunk, num_chunks = b"x" * 2**16, 1024
    body = [part("purpose", b"fine-tune") + part("file", b"", filename="x")[:-2], *[chunk] * num_chunks, b"\r\n" + END]
    waiting = iter(body)

    async def receive() -> dict[str, Any]:
        piece = next(waiting)
        return {"type": "http.request", "body": piece, "more_body": piece is not body[-1]}

    async def take() -> int:
        headers = [(b"content-type", MULTIPART["content-type"].encode())]
        request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
        async with file_upload.receive_upload(request, folder=tmp_path, max_bytes=2**27) as upload:
            assert upload.path.stat().st_size == upload.num_bytes
            return upload.num_bytes

    tracemalloc.start()
    num_bytes = asyncio.run(take())
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert num_bytes == 64 * 2**20
    assert peak_bytes < 4 * 2**20
    assert not list(tmp_path.iterdir())


def test_stale_spool_files_are_removed(services: Services) -> None:
    folder = services.settings.data_dir / "spool"
    folder.mkdir()
    old, new = folder / "upload-old", folder / "upload-new"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))

    file_upload.remove_stale(folder)

    assert not old.exists()
    assert new.exists()


def test_client_that_is_still_sending_receives_the_rejection(site: Site, services: Services) -> None:
    content = b"x" * (30 * 2**20)
    with site.http() as http:
        form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("x.jsonl", content)}}
        too_large = http.post("/v1/files", **form)
        no_key = http.post("/v1/files", headers={"authorization": "Bearer wrong"}, **form)
        no_route = http.post("/v1/uploads", **form)
        after = http.get("/v1/files")

    assert [too_large.status_code, no_key.status_code, no_route.status_code] == [413, 401, 413]
    assert error_of(too_large)["code"] == "file_too_large"
    assert after.status_code == 200
    assert not list((services.settings.data_dir / "spool").glob("*"))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"prompt": "a", "completion": "b"}', "completion"),
        (b'\xef\xbb\xbf{"text": "a"}', "text"),
        (chat_lines(1), "chat"),
    ],
)
def test_file_shows_the_kind_of_its_rows(client: TestClient, content: bytes, kind: str) -> None:
    made = upload(client, content).json()

    assert made["kind"] == kind
    assert client.get(f"/v1/files/{made['id']}").json()["kind"] == kind
    assert upload(client, content, purpose="user_data").json()["kind"] is None


def test_duplicate_upload_names_the_earlier_file(client: TestClient) -> None:
    first = upload(client, chat_lines(2)).json()
    other = upload(client, chat_lines(3)).json()
    as_other_data = upload(client, chat_lines(2), purpose="user_data").json()

    again = upload(client, chat_lines(2), name="copy.jsonl").json()

    assert [made["same_content_as"] for made in (first, other, as_other_data, again)] == [None, None, None, first["id"]]
    client.delete(f"/v1/files/{first['id']}")
    assert upload(client, chat_lines(2)).json()["same_content_as"] == again["id"]


def test_file_expires_if_requested(client: TestClient) -> None:
    lifetime = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    content = {"file": ("a.jsonl", chat_lines(1))}

    made = client.post("/v1/files", data={"purpose": "fine-tune", **lifetime}, files=content).json()

    assert made["expires_at"] == made["created_at"] + 3600
    assert client.get(f"/v1/files/{made['id']}").json()["expires_at"] == made["expires_at"]
    assert upload(client, chat_lines(1)).json()["expires_at"] is None


@pytest.mark.parametrize(
    ("given", "param", "fragment"),
    [
        ({"anchor": "created_at"}, "expires_after.seconds", "missing"),
        ({"seconds": "3600"}, "expires_after.anchor", "missing"),
        ({"anchor": "last_active_at", "seconds": "3600"}, "expires_after.anchor", "'created_at'"),
        ({"anchor": "created_at", "seconds": "3599"}, "expires_after.seconds", "at least 3600"),
        ({"anchor": "created_at", "seconds": "2592001"}, "expires_after.seconds", "at most 2592000"),
        ({"anchor": "created_at", "seconds": "soon"}, "expires_after.seconds", "a whole number"),
    ],
)
def test_invalid_expiry_is_rejected(
    client: TestClient, services: Services, given: dict[str, str], param: str, fragment: str
) -> None:
    fields = {f"expires_after[{name}]": value for name, value in given.items()}

    response = client.post(
        "/v1/files", data={"purpose": "fine-tune", **fields}, files={"file": ("a.jsonl", chat_lines(1))}
    )

    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], fragment in error["message"]) == (param, True), error
    assert nothing_is_left(services, client)
