"""A key goes to no listener on this machine that has not proved to be the user's own service."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from typer.testing import Result

from lorry import ConnectionFailed, Lorry, ServiceNotVerified, connection
from lorry.cli.commands.up import is_ready, keep_key_good
from lorry.connection import Connection
from lorry.transport.retries import RetryPolicy
from lorry.transport.service_identity import VerifiedTransport
from tests.lorry.scripted_server import Reply, Script

Run = Callable[..., Result]
JOBS = "/v1/fine_tuning/jobs"
KEY = "lorry_key-1_canary"
ONE_PAGE = {"data": [], "has_more": False}


@pytest.fixture
def data_dir(service: Script, tmp_path: Path) -> Path:
    """What an earlier `lorry up` left: the address at which somebody else listens by now."""
    connection.write(tmp_path, Connection(url=service.url, api_key=KEY, identity_secret="5e" * 32))
    return tmp_path


def saw_the_key(service: Script) -> bool:
    return any("authorization" in seen.headers or KEY in f"{seen}" for seen in service.seen)


@pytest.mark.parametrize(
    "answer",
    [
        Reply(body={"proof": "0" * 64}),
        Reply(body={"proof": 3}),
        Reply(body=["proof"]),
        Reply(body=b"<html>"),
        Reply(body=b"x" * 100_000),
        Reply(body={"proof": "\ud800"}),
        Reply(body={}, status=404),
        Reply(body={}, status=302, headers={"location": "http://127.0.0.1:1/"}),
    ],
)
def test_a_listener_that_took_the_port_of_the_connection_file_receives_no_key(
    service: Script, run: Run, data_dir: Path, monkeypatch: pytest.MonkeyPatch, answer: Reply
) -> None:
    service.identity_secret = None
    service.on("GET", "/v1/service_identity", answer)
    service.on("GET", JOBS, ONE_PAGE)
    monkeypatch.setenv("LORRY_DATA_DIR", str(data_dir))
    for name in ("LORRY_URL", "LORRY_API_KEY"):
        monkeypatch.delenv(name)

    result = run("jobs", "list")

    assert not saw_the_key(service)
    assert result.exit_code == 1
    assert "did not prove that it is your Lorry service" in result.stderr
    assert "lorry up" in result.stderr


def test_a_variable_that_names_the_local_service_does_not_weaken_the_check(
    service: Script, run: Run, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.identity_secret = "00" * 32
    service.on("GET", JOBS, ONE_PAGE)
    monkeypatch.setenv("LORRY_DATA_DIR", str(data_dir))
    monkeypatch.setenv("LORRY_API_KEY", KEY)

    assert "did not prove" in run("jobs", "list").stderr
    assert not saw_the_key(service)


def test_neither_the_readiness_check_nor_the_key_check_of_a_start_trusts_another_listener(service: Script) -> None:
    service.identity_secret = None
    service.on("GET", "/readyz", {"status": "ok"})
    known = Connection(url=service.url, api_key=KEY, identity_secret="5e" * 32)

    with pytest.raises(ServiceNotVerified):
        is_ready(known)
    with pytest.raises(ServiceNotVerified):
        keep_key_good(None, known)  # pyright: ignore[reportArgumentType] - it is not reached
    assert not saw_the_key(service)


def test_a_service_that_proves_its_identity_is_used_over_the_same_connection(service: Script, data_dir: Path) -> None:
    service.on("GET", JOBS, ONE_PAGE)

    with Lorry(data_dir=data_dir) as lorry:
        for _ in range(3):
            assert list(lorry.jobs.list()) == []

    assert saw_the_key(service)
    assert is_ready(replace(connection.find(data_dir=data_dir, environ={}), url="http://127.0.0.1:1")) is False


def test_each_new_connection_is_checked_again(service: Script, data_dir: Path) -> None:
    service.on("GET", JOBS, Reply(body=ONE_PAGE, headers={"connection": "close"}))

    with Lorry(data_dir=data_dir) as lorry:
        list(lorry.jobs.list())
        service.seen.clear()
        service.identity_secret = None
        with pytest.raises(ServiceNotVerified):
            list(lorry.jobs.list())

    assert not saw_the_key(service)


def pump(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
    """Forwards one direction until it ends."""
    with suppress(OSError):
        while data := source.recv(65536):
            kept.extend(data)
            target.sendall(data)


@contextmanager
def relaying(url: str) -> Iterator[tuple[str, bytearray]]:
    """Forwards every connection at another port to the real service, and keeps what clients sent."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def forward() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                with client, socket.create_connection((host, int(port))) as real:
                    back = threading.Thread(target=pump, args=(real, client, bytearray()), daemon=True)
                    back.start()
                    pump(client, real, heard)
                    real.shutdown(socket.SHUT_RDWR)
                    back.join(10)

        thread = threading.Thread(target=forward, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", heard
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_a_relay_to_the_real_service_on_another_port_receives_no_key(service: Script, data_dir: Path) -> None:
    known = connection.find(data_dir=data_dir, environ={})
    with relaying(service.url) as (url, heard):
        connection.write(data_dir, replace(known, url=url))
        with Lorry(data_dir=data_dir) as lorry, pytest.raises(ServiceNotVerified):
            list(lorry.jobs.list())

    assert b"/v1/service_identity?nonce=" in heard
    assert b"authorization" not in bytes(heard).lower()


def test_a_busy_service_is_tried_again_and_a_silent_or_absent_one_is_not_reached(
    service: Script, data_dir: Path
) -> None:
    service.identity_secret = None
    service.on("GET", "/v1/service_identity", Reply(body={}, status=503))
    slept: list[float] = []

    with Lorry(data_dir=data_dir, sleep=slept.append) as lorry, pytest.raises(ConnectionFailed, match="503"):
        list(lorry.jobs.list())

    assert len(slept) == RetryPolicy().max_retries
    assert not saw_the_key(service)


def test_a_service_that_closes_the_connection_after_its_proof_is_not_reached(service: Script, data_dir: Path) -> None:
    service.is_shutting_down = True
    service.on("GET", JOBS, ONE_PAGE)
    slept: list[float] = []

    with Lorry(data_dir=data_dir, sleep=slept.append) as lorry, pytest.raises(ConnectionFailed, match="shutting down"):
        list(lorry.jobs.list())

    assert len(slept) == RetryPolicy().max_retries


def test_an_answer_that_breaks_off_is_an_error_of_httpx(service: Script, data_dir: Path) -> None:
    service.on("GET", JOBS, Reply(body={"data": []}, cut=True))
    secret = connection.find(data_dir=data_dir, environ={}).identity_secret
    assert secret is not None

    with (
        httpx.Client(transport=VerifiedTransport(secret), base_url=service.url) as client,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        client.get(JOBS)


def test_the_file_of_a_start_holds_what_the_check_needs(data_dir: Path) -> None:
    assert set(json.loads((data_dir / "connection.json").read_text())) == {"url", "api_key", "identity_secret"}
