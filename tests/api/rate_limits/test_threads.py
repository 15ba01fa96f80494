"""Slow work does not block the API server, and stops when its client disconnects."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

import anyio
import psutil
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.deps import Services
from api.rate_limits import threads
from api.rate_limits.threads import KEY_CHECK_THREADS, ROUTE_THREADS, SLOW_THREADS, SlowWork
from catalog.datasets import check_process, validator
from catalog.db.database import POOL
from catalog.errors import Unavailable
from catalog.storage import files
from catalog.storage.store import ArtifactStore
from catalog.tables.storage import Adapter
from tests.api.site import Site, chat_lines, connect, error_of, read_to_end, running, until
from tests.catalog.world import World

MANY = 45
"""More requests than the process has route threads."""
LARGE = chat_lines(1000)
STUCK = (sys.executable, "-c", "import os; os.read(0, 1)")
"""A check that runs until its standard input closes."""


class Gatekeeper:
    """Counts calls, and blocks each until `open` is set."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.num_inside = 0
        self._lock = threading.Lock()

    def __call__(self, *_: object, **__: object) -> list[str]:
        with self._lock:
            self.num_inside += 1
        assert self.open.wait(60)
        return []


@contextmanager
def sent(site: Site, method: str, path: str, number: int) -> Iterator[list[socket.socket]]:
    """Send `number` requests without reading the responses."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {site.key}\r\nContent-Length: 0\r\n\r\n"
    )
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(connect(site))) for _ in range(number)]
        for client in clients:
            client.sendall(head.encode())
        yield clients


def test_verifications_of_one_project_use_at_most_two_threads(
    site: Site, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = Gatekeeper()
    monkeypatch.setattr(ArtifactStore, "verify", verify)

    with sent(site, "POST", f"/v1/adapters/{adapter.id}/verify", MANY), site.http() as client:
        try:
            until(lambda: verify.num_inside >= threads.SLOW_THREADS_OF_PROJECT)
            answers = [client.get(path, timeout=20).status_code for path in ("/readyz", "/v1/files", "/v1/projects")]
            num_inside = verify.num_inside
        finally:
            verify.open.set()

    assert answers == [200, 200, 200]
    assert num_inside == 2


def test_one_project_cannot_use_all_route_threads(
    site: Site, monkeypatch: pytest.MonkeyPatch, stranger_key: str
) -> None:
    list_page = Gatekeeper()
    monkeypatch.setattr(files, "list_page", list_page)
    stranger = Site(url=site.url, key=stranger_key, server=site.server)

    with sent(site, "GET", "/v1/files", MANY), stranger.http() as client:
        try:
            until(lambda: list_page.num_inside >= threads.ROUTE_THREADS_OF_PROJECT)
            statuses = [client.get(path, timeout=20).status_code for path in ("/v1/fine_tuning/jobs", "/v1/queue")]
            num_inside = list_page.num_inside
        finally:
            list_page.open.set()

    assert statuses == [200, 200]
    assert num_inside == threads.ROUTE_THREADS_OF_PROJECT


def test_keys_are_checked_while_all_route_threads_are_busy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    list_page = Gatekeeper()
    monkeypatch.setattr(files, "list_page", list_page)
    monkeypatch.setattr(threads, "ROUTE_THREADS_OF_PROJECT", threads.ROUTE_THREADS)

    with sent(site, "GET", "/v1/files", MANY), site.http() as client:
        try:
            until(lambda: list_page.num_inside >= threads.ROUTE_THREADS)
            refused = client.get("/v1/files", headers={"authorization": "Bearer lorry_x_y"}, timeout=20)
        finally:
            list_page.open.set()

    assert refused.status_code == 401
    assert list_page.num_inside <= MANY


def test_request_unfinished_at_shutdown_gets_a_retryable_503(
    app: FastAPI, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_page = Gatekeeper()
    monkeypatch.setattr(files, "list_page", list_page)

    try:
        with running(app, key, shutdown_seconds=1) as site, sent(site, "GET", "/v1/files", 1) as (client,):
            until(lambda: list_page.num_inside == 1)
            site.server.should_exit = True
            head, _, body = read_to_end(client).partition(b"\r\n\r\n")
    finally:
        list_page.open.set()

    assert head.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 5" in head
    assert json.loads(body)["error"]["code"] == "shutting_down"


def test_request_without_a_thread_in_time_gets_a_retryable_503(
    site: Site, app: FastAPI, services: Services, world: World, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = Gatekeeper()
    monkeypatch.setattr(ArtifactStore, "verify", verify)
    path = f"/v1/adapters/{adapter.id}/verify"
    app.state.services = replace(services, slow_work=SlowWork(wait_seconds=1))

    with sent(site, "POST", path, 2), site.http() as client:
        try:
            until(lambda: verify.num_inside == 2)
            refused = client.post(path, timeout=20)
        finally:
            verify.open.set()

    assert (refused.status_code, error_of(refused)["code"]) == (503, "too_many_requests")
    assert refused.headers["retry-after"] == "5"
    expected = f"waited 1 s for other uploads and verifications: project {world.caller.project_id} can run at most 2 "
    assert expected in error_of(refused)["message"]


def test_busy_server_is_distinguished_from_a_busy_project() -> None:
    slow_work = SlowWork(num_threads=1, per_project=2, wait_seconds=1)
    release = threading.Event()

    async def refused() -> str:
        async with anyio.create_task_group() as group:
            group.start_soon(slow_work.run, "ours", lambda: release.wait(60))
            await anyio.wait_all_tasks_blocked()
            try:
                await slow_work.run("theirs", lambda: None)
            except Unavailable as error:
                return error.message
            finally:
                release.set()
        return ""

    assert "the API server can run at most 1 at the same time" in anyio.run(refused)


def test_busy_project_leaves_slow_threads_to_other_projects(
    site: Site, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, stranger_key: str
) -> None:
    verify = Gatekeeper()
    monkeypatch.setattr(ArtifactStore, "verify", verify)
    stranger = Site(url=site.url, key=stranger_key, server=site.server)

    with sent(site, "POST", f"/v1/adapters/{adapter.id}/verify", MANY), stranger.http() as client:
        try:
            until(lambda: verify.num_inside >= 2)
            made = client.post(
                "/v1/files", data={"purpose": "user_data"}, files={"file": ("a", b"some bytes")}, timeout=20
            )
        finally:
            verify.open.set()

    assert made.status_code == 200


def upload(client: TestClient, content: bytes) -> int:
    return client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", content)}).status_code


def test_large_data_set_is_checked_in_another_process(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def inspect(*_: object, **__: object) -> None:
        raise AssertionError("checked in the API server's own process")

    monkeypatch.setattr(validator, "inspect", inspect)

    assert len(LARGE) > files.SHORT_BYTES
    assert upload(client, LARGE) == 200
    assert upload(client, LARGE + b"{nonsense}\n") == 400


def checks() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if _is_check(each)]


def _is_check(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[: len(STUCK)] == list(STUCK)
    except psutil.NoSuchProcess:  # it has exited; psutil.ZombieProcess until its parent waits for it
        return False


def begin_upload(site: Site) -> socket.socket:
    """Return a client that has sent a complete data set and waits for the response."""
    line = json.dumps({"x": 1}).encode()
    head = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n'
    body = head % (b"purpose", b"") + b"fine-tune\r\n" + head % (b"file", b'; filename="a.jsonl"')
    body += (line + b"\n") * (files.SHORT_BYTES // len(line)) + b"\r\n--b--\r\n"
    client = connect(site)
    client.sendall(
        f"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {site.key}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return client


def test_check_stops_when_its_client_disconnects(
    site: Site, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_process, "COMMAND", STUCK)
    with closing(begin_upload(site)):
        until(checks)

    until(lambda: not checks())

    spool = services.settings.data_dir / "spool"
    until(lambda: not list(spool.iterdir()))
    with site.http() as client:
        assert client.get("/v1/files").status_code == 200


def test_check_stops_with_the_server(app: FastAPI, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_process, "COMMAND", STUCK)
    with ExitStack() as stack:
        with running(app, key) as site:
            stack.enter_context(closing(begin_upload(site)))
            until(checks)
        until(lambda: not checks())


def test_database_pool_covers_all_threads() -> None:
    assert POOL["pool_size"] + POOL["max_overflow"] > ROUTE_THREADS + KEY_CHECK_THREADS + SLOW_THREADS
