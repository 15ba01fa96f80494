"""A real server on loopback in a thread of the test process, and helpers for its responses."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.server import HttpConnection, Server, server_config

PEPPER = b"p" * 32
UNTIL_SECONDS = 30.0
"""The time after which a test gives up."""
CHAT = {"messages": [{"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "2"}]}


@dataclass(frozen=True, kw_only=True)
class Site:
    url: str
    key: str
    server: Server

    def http(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)


class QuietServer(Server):
    """Signals to a waiting thread that it is ready, instead of printing it."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config, app.state.services)
        self.ready = threading.Event()

    def announce(self, url: str) -> None:
        self.url = url
        self.ready.set()


@contextmanager
def running(
    app: FastAPI, key: str, *, connection: type[HttpConnection] = HttpConnection, shutdown_seconds: int = 5
) -> Iterator[Site]:
    config = server_config(app, host="127.0.0.1", port=0, shutdown_seconds=shutdown_seconds, connection=connection)
    server = QuietServer(config, app)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert server.ready.wait(20), "the server did not start"
    try:
        yield Site(url=server.url, key=key, server=server)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


def connect(site: Site) -> socket.socket:
    """Connect with a small receive buffer, so that unread data stays at the server."""
    parts = urlsplit(site.url)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(UNTIL_SECONDS)
    client.connect((parts.hostname, parts.port))
    return client


def read_to_end(client: socket.socket) -> bytes:
    received = bytearray()
    try:
        while piece := client.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return bytes(received)


def until(condition: Callable[[], object]) -> None:
    """Poll until the condition is true. Fails after `UNTIL_SECONDS`."""
    end, pause = time.monotonic() + UNTIL_SECONDS, threading.Event()
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        pause.wait(0.01)


SAME_ORIGIN = {"x-lorry-csrf": "1", "origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"}
"""Headers of the dashboard's own requests."""


def new_token(client: TestClient) -> str:
    """Return the token of a new sign-in link of this client."""
    return client.post("/v1/sign_in_links").json()["url"].partition("/dashboard/#/sign-in/")[2]


def open_link(browser: TestClient, client: TestClient) -> Any:
    """Sign the browser in with a new link of this client."""
    return browser.post("/v1/sign_in_links/open", json={"token": new_token(client)}, headers=SAME_ORIGIN)


def chat_lines(num_rows: int) -> bytes:
    return b"".join(json.dumps({**CHAT}).encode() + b"\n" for _ in range(num_rows))


def error_of(response: Any) -> dict[str, Any]:
    """Return the error of a response. Fails if it does not have OpenAI's shape."""
    body = response.json()
    assert set(body) == {"error"}, body
    error = body["error"]
    assert {"message", "type", "param", "code", "remedy"} <= set(error), error
    assert error["message"], "an error has a message"
    assert error["remedy"] in error["message"], "the message contains the remedy"
    assert error["type"] in {
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "rate_limit_error",
        "server_error",
    }
    assert response.headers["x-request-id"].startswith("req_")
    return error


@dataclass(frozen=True, kw_only=True)
class Message:
    """One server-sent event."""

    event: str
    data: dict[str, Any]
    id: str | None


def messages(lines: Iterator[str]) -> Iterator[Message]:
    """Yield the events of a stream as they arrive. Comments are skipped."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield Message(event=fields["event"], data=json.loads(fields["data"]), id=fields.get("id"))
            fields = {}
