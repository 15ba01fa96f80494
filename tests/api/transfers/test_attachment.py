"""Downloads: a damaged file never looks complete, and a client that stops reading uses few resources."""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import random
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI

from api.deps import Services
from api.server import HttpConnection, Timeouts
from api.transfers.attachment import PIECE_BYTES, READ_BYTES, Downloads
from catalog.errors import RateLimited
from catalog.settings import Settings
from catalog.storage.object_storage import Objects
from catalog.storage.store import ArtifactStore, blob_key
from tests.api.conftest import new_key
from tests.api.site import Site, connect, error_of, read_to_end, running, until
from tests.catalog.world import World

LARGE_BYTES = 5 * 2**20 + 17
MORE_THAN_A_SOCKET_TAKES = 24 * 2**20
HIGH_WATER_BYTES = 64 * 2**10
"""The size of the write buffer above which an asyncio transport pauses its writer."""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"max_file_bytes": 64 * 2**20})


def upload(site: Site, content: bytes) -> str:
    with site.http() as client:
        sent = client.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("a.bin", content)}, timeout=30)
        return sent.json()["id"]


def flip_last_bit(services: Services, content: bytes) -> None:
    folder = services.store.objects.folder
    assert folder is not None
    path: Path = folder / blob_key(hashlib.sha256(content).hexdigest())
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


def by_httpx(site: Site, path: str) -> bytes:
    with site.http() as client:
        return client.get(path, timeout=30).content


def by_urllib(site: Site, path: str) -> bytes:
    request = urllib.request.Request(f"{site.url}{path}", headers={"authorization": f"Bearer {site.key}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
        return response.read()


def by_hand(site: Site, path: str) -> bytes:
    """Read until the connection closes, then compare the length."""
    connection = http.client.HTTPConnection(urlsplit(site.url).netloc, timeout=30)
    connection.request("GET", path, headers={"authorization": f"Bearer {site.key}"})
    response = connection.getresponse()
    expected = int(response.headers["content-length"])
    content = b"".join(iter(lambda: response.read1(2**16), b""))
    connection.close()
    if len(content) != expected:
        raise http.client.IncompleteRead(content, expected - len(content))
    return content


def by_curl(site: Site, path: str) -> bytes:
    if shutil.which("curl") is None:
        assert os.environ.get("CI", "").lower() not in ("true", "1"), "curl is not installed"
        pytest.skip("curl is not installed")
    command = ["curl", "-s", "--noproxy", "*", "-H", f"Authorization: Bearer {site.key}", f"{site.url}{path}"]
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


@pytest.mark.parametrize("read", [by_httpx, by_urllib, by_hand, by_curl])
def test_download_of_a_damaged_file_is_truncated_and_clients_fail(
    site: Site, services: Services, read: Callable[[Site, str], bytes]
) -> None:
    content = random.Random(1).randbytes(LARGE_BYTES)
    path = f"/v1/files/{upload(site, content)}/content"
    assert read(site, path) == content

    flip_last_bit(services, content)

    failures = (httpx.TransportError, http.client.IncompleteRead, subprocess.CalledProcessError)
    with pytest.raises(failures):
        read(site, path)


def test_damaged_file_of_one_chunk_returns_an_error(site: Site, services: Services) -> None:
    content = b"short"
    path = f"/v1/files/{upload(site, content)}/content"
    flip_last_bit(services, content)

    with site.http() as client:
        response = client.get(path)

    assert response.status_code == 500
    assert error_of(response)["code"] == "artifact_damaged"


def test_download_has_a_digest_header(site: Site) -> None:
    content = b"some bytes"
    file_id = upload(site, content)

    with site.http() as client:
        response = client.get(f"/v1/files/{file_id}/content")

    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    assert response.headers["repr-digest"] == f"sha-256=:{digest}:"


def get(site: Site, path: str) -> socket.socket:
    """Return a client that has sent its request and reads nothing."""
    client = connect(site)
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {site.key}\r\n\r\n".encode())
    return client


def paused(site: Site, number: int) -> list[HttpConnection]:
    """Wait until `number` connections of the server are paused by unread data, and return them."""

    def waiting() -> list[HttpConnection]:
        connections = [cast(HttpConnection, each) for each in list(site.server.server_state.connections)]
        return [each for each in connections if each.flow.write_paused]

    until(lambda: len(waiting()) >= number)
    return waiting()


def test_stalled_client_holds_a_bounded_buffer(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"/v1/files/{upload(site, random.Random(2).randbytes(MORE_THAN_A_SOCKET_TAKES))}/content"
    chunks: list[int] = []
    original = Objects.read

    def read(objects: Objects, key: str, *, chunk_bytes: int) -> Iterator[bytes]:
        for chunk in original(objects, key, chunk_bytes=chunk_bytes):
            chunks.append(len(chunk))
            yield chunk

    monkeypatch.setattr(Objects, "read", read)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(closing(get(site, path)))
        buffered = [each.transport.get_write_buffer_size() for each in paused(site, 4)]

    assert len(buffered) == 4
    assert max(buffered) <= HIGH_WATER_BYTES + PIECE_BYTES + 1024
    assert max(chunks) == READ_BYTES


def test_concurrent_downloads_are_limited_per_key_and_per_process(
    site: Site, app: FastAPI, services: Services, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/v1/files/{upload(site, random.Random(3).randbytes(MORE_THAN_A_SOCKET_TAKES))}/content"
    app.state.services = replace(services, downloads=Downloads(per_key=2, per_process=3))
    open_blob, opened = ArtifactStore.open_blob, list[str]()

    def noted(self: ArtifactStore, digest: str, **given: Any) -> Iterator[bytes]:
        opened.append(digest)
        return open_blob(self, digest, **given)

    monkeypatch.setattr(ArtifactStore, "open_blob", noted)
    other = Site(url=site.url, key=new_key(services, world.caller.project_id), server=site.server)

    with ExitStack() as stack, site.http() as client, other.http() as another:
        for each in (site, site):
            stack.enter_context(closing(get(each, path)))
        paused(site, 2)
        of_key = client.get(path)
        stack.enter_context(closing(get(other, path)))
        paused(site, 3)
        of_process = another.get(path)
        small = another.get("/v1/files")

    assert (of_key.status_code, error_of(of_key)["code"]) == (429, "too_many_requests")
    assert (of_process.status_code, error_of(of_process)["code"]) == (503, "too_many_requests")
    assert of_key.headers["retry-after"] == of_process.headers["retry-after"] == "5"
    assert small.status_code == 200
    assert len(opened) == 3, "a rejected download opens no file"


def test_concurrent_downloads_are_limited_per_project() -> None:
    downloads = Downloads(per_key=2, per_project=3, per_process=10)

    with ExitStack() as stack:
        for number in range(3):
            stack.enter_context(downloads.admitted(api_key_id=f"key {number}", project_id="ours"))
        with pytest.raises(RateLimited, match="Project ours has reached its maximum of 3") as refusal:
            stack.enter_context(downloads.admitted(api_key_id="key 4", project_id="ours"))
        stack.enter_context(downloads.admitted(api_key_id="key 5", project_id="theirs"))
    with downloads.admitted(api_key_id="key 4", project_id="ours"):
        pass

    assert refusal.value.code == "too_many_requests"


class Unread(HttpConnection):
    timeouts = Timeouts(send_seconds=0.1)


class CountedDownloads(Downloads):
    def __init__(self, *, per_key: int) -> None:
        super().__init__(per_key=per_key)
        self.admitted_keys: list[str] = []

    @contextmanager
    def admitted(self, *, api_key_id: str, project_id: str) -> Generator[None]:
        with super().admitted(api_key_id=api_key_id, project_id=project_id):
            self.admitted_keys.append(api_key_id)
            yield


def test_stalled_download_is_aborted_and_frees_its_slot(
    app: FastAPI, key: str, services: Services, world: World
) -> None:
    downloads, key_id = CountedDownloads(per_key=1), key.split("_")[1]
    app.state.services = replace(services, downloads=downloads)

    def has_room() -> bool:
        try:
            with downloads.admitted(api_key_id=key_id, project_id=world.caller.project_id):
                return True
        except RateLimited:
            return False

    with running(app, key, connection=Unread) as site:
        path = f"/v1/files/{upload(site, random.Random(4).randbytes(MORE_THAN_A_SOCKET_TAKES))}/content"
        with closing(get(site, path)) as client:
            until(lambda: downloads.admitted_keys)
            assert downloads.admitted_keys[0] == key_id
            until(has_room)
            received = read_to_end(client)

    assert len(received) < MORE_THAN_A_SOCKET_TAKES
