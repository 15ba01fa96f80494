"""The client sends its key to a local listener only if the listener proves that it is the user's service."""

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
from lorry.cli.commands.up import is_ready, replace_invalid_key
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
    """Return a data folder whose connection file names the address of the scripted listener."""
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
def test_foreign_listener_at_the_recorded_port_receives_no_key(
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


def test_variable_that_names_the_local_service_does_not_weaken_the_check(
    service: Script, run: Run, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.identity_secret = "00" * 32
    service.on("GET", JOBS, ONE_PAGE)
    monkeypatch.setenv("LORRY_DATA_DIR", str(data_dir))
    monkeypatch.setenv("LORRY_API_KEY", KEY)

    assert "did not prove" in run("jobs", "list").stderr
    assert not saw_the_key(service)


def test_start_up_checks_do_not_trust_a_foreign_listener(service: Script) -> None:
    service.identity_secret = None
    service.on("GET", "/readyz", {"status": "ok"})
    known = Connection(url=service.url, api_key=KEY, identity_secret="5e" * 32)

    with pytest.raises(ServiceNotVerified):
        is_ready(known)
    with pytest.raises(ServiceNotVerified):
        replace_invalid_key(None, known)  # pyright: ignore[reportArgumentType] - it is not reached
    assert not saw_the_key(service)


def test_verified_service_is_used_over_the_same_connection(service: Script, data_dir: Path) -> None:
    service.on("GET", JOBS, ONE_PAGE)

    with Lorry(data_dir=data_dir) as lorry:
        for _ in range(3):
            assert list(lorry.jobs.list()) == []

    assert saw_the_key(service)
    assert is_ready(replace(connection.find(data_dir=data_dir, environ={}), url="http://127.0.0.1:1")) is False


def test_each_new_connection_is_verified(service: Script, data_dir: Path) -> None:
    service.on("GET", JOBS, Reply(body=ONE_PAGE, headers={"connection": "close"}))

    with Lorry(data_dir=data_dir) as lorry:
        list(lorry.jobs.list())
        service.seen.clear()
        service.identity_secret = None
        with pytest.raises(ServiceNotVerified):
            list(lorry.jobs.list())

    assert not saw_the_key(service)


def pump(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
    """Forward one direction until its source closes."""
    with suppress(OSError):
        while data := source.recv(65536):
            kept.extend(data)
            target.sendall(data)


@contextmanager
def relaying(url: str) -> Iterator[tuple[str, bytearray]]:
    """Forward connections at another port to the real service, and record the bytes that clients send."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    recorded = bytearray()
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
                    pump(client, real, recorded)
                    real.shutdown(socket.SHUT_RDWR)
                    back.join(10)

        thread = threading.Thread(target=forward, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", recorded
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_relay_to_the_real_service_receives_no_key(service: Script, data_dir: Path) -> None:
    known = connection.find(data_dir=data_dir, environ={})
    with relaying(service.url) as (url, recorded):
        connection.write(data_dir, replace(known, url=url))
        with Lorry(data_dir=data_dir) as lorry, pytest.raises(ServiceNotVerified):
            list(lorry.jobs.list())

    assert b"/v1/service_identity?nonce=" in recorded
    assert b"authorization" not in bytes(recorded).lower()


def test_unavailable_identity_check_is_retried_without_sending_the_key(service: Script, data_dir: Path) -> None:
    service.identity_secret = None
    service.on("GET", "/v1/service_identity", Reply(body={}, status=503))
    slept: list[float] = []

    with Lorry(data_dir=data_dir, sleep=slept.append) as lorry, pytest.raises(ConnectionFailed, match="503"):
        list(lorry.jobs.list())

    assert len(slept) == RetryPolicy().max_retries
    assert not saw_the_key(service)


def test_connection_closed_after_the_proof_is_retried_then_fails(service: Script, data_dir: Path) -> None:
    service.is_shutting_down = True
    service.on("GET", JOBS, ONE_PAGE)
    slept: list[float] = []

    with Lorry(data_dir=data_dir, sleep=slept.append) as lorry, pytest.raises(ConnectionFailed, match="shutting down"):
        list(lorry.jobs.list())

    assert len(slept) == RetryPolicy().max_retries


def test_truncated_response_raises_an_httpx_error(service: Script, data_dir: Path) -> None:
    service.on("GET", JOBS, Reply(body={"data": []}, cut=True))
    secret = connection.find(data_dir=data_dir, environ={}).identity_secret
    assert secret is not None

    with (
        httpx.Client(transport=VerifiedTransport(secret), base_url=service.url) as client,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        client.get(JOBS)


def test_connection_file_has_the_fields_for_the_identity_check(data_dir: Path) -> None:
    assert set(json.loads((data_dir / "connection.json").read_text())) == {"url", "api_key", "identity_secret"}
