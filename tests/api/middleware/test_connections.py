"""Connections whose clients make no progress are closed: with a manual clock, and on a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import closing
from typing import Any, cast

import pytest
import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from api.server import MIN_BODY_BYTES, MIN_RESPONSE_BYTES, HttpConnection, Timeouts, server_config
from tests.api.site import connect, read_to_end, running

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"


class Timer:
    def __init__(self, at: float, act: Callable[[], None]) -> None:
        self.at, self.act, self.is_cancelled = at, act, False

    def cancel(self) -> None:
        self.is_cancelled = True


class Unstarted:
    """A task that never runs."""

    def add_done_callback(self, _act: Callable[..., None]) -> None: ...


class ManualLoop:
    """Runs timers on a manual clock. Never handles requests."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, act: Callable[..., None], *arguments: Any) -> Timer:
        timer = Timer(self.now + seconds, lambda: act(*arguments))
        self.timers.append(timer)
        return timer

    def create_task(self, work: Coroutine[Any, Any, None]) -> Any:
        work.close()
        return Unstarted()

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [timer for timer in self.timers if timer.at <= end and not timer.is_cancelled]:
            timer = min(due, key=lambda each: each.at)
            self.timers.remove(timer)
            self.now = timer.at
            timer.act()
        self.now = end


class FakeTransport:
    """Records the bytes written and how the connection ended."""

    def __init__(self) -> None:
        self.sent = b""
        self.num_waiting = 0
        self.ends: list[str] = []

    def get_extra_info(self, _name: str) -> Any:
        return None

    def is_closing(self) -> bool:
        return self.end is not None

    def write(self, data: bytes) -> None:
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return self.num_waiting

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    @property
    def end(self) -> str | None:
        return self.ends[0] if self.ends else None

    def close(self) -> None:
        self.ends.append("closed")

    def abort(self) -> None:
        self.ends.append("aborted")


class Wire:
    """A connection without a server, a client or real time."""

    def __init__(self) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None: ...

        self.loop, self.transport = ManualLoop(), FakeTransport()
        config = uvicorn.Config(app, log_config=None, ws="none")
        loop = cast(asyncio.AbstractEventLoop, self.loop)
        self.connection = HttpConnection(config=config, server_state=ServerState(), app_state={}, _loop=loop)
        self.connection.connection_made(cast(asyncio.Transport, self.transport))
        self.receive, self.advance = self.connection.data_received, self.loop.advance

    @property
    def end(self) -> str | None:
        return self.transport.end


@pytest.fixture
def wire() -> Wire:
    return Wire()


LIMITS = Timeouts()


def test_connection_that_sends_nothing_is_closed(wire: Wire) -> None:
    wire.advance(LIMITS.header_seconds - 1)
    assert wire.end is None

    wire.advance(1)

    assert (wire.end, wire.transport.sent) == ("closed", b"")


def test_headers_that_trickle_in_are_answered_with_408(wire: Wire) -> None:
    wire.receive(HEAD)
    for _ in range(20):
        wire.advance(LIMITS.header_seconds / 20)
        if wire.end is None:
            wire.receive(b"X-More: 1\r\n")

    head, _, body = wire.transport.sent.partition(b"\r\n\r\n")
    assert wire.end == "closed"
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["code"] == "request_timeout"


def test_stalled_body_aborts_but_slow_body_continues(wire: Wire) -> None:
    wire.receive(POST)
    for _ in range(5):
        wire.connection.flow.resume_reading()  # as a route does when it reads the body
        wire.receive(b"x" * MIN_BODY_BYTES)
        wire.connection.cycle.body.clear()
        wire.advance(LIMITS.body_seconds)
    assert wire.end is None

    wire.receive(b"x" * (MIN_BODY_BYTES - 1))
    wire.advance(LIMITS.body_seconds)

    assert wire.end == "aborted"


def test_unread_body_does_not_count_as_client_delay(wire: Wire) -> None:
    wire.receive(POST + b"x" * 100_000)  # more than uvicorn buffers, so it stops reading

    wire.advance(10 * LIMITS.body_seconds)

    assert wire.end is None


def test_long_request_processing_does_not_time_out(wire: Wire) -> None:
    wire.receive(HEAD + b"\r\n")

    wire.advance(3600)

    assert wire.end is None


def refill(wire: Wire, num_waiting: int) -> None:
    """Write the next piece of the response, so that asyncio pauses the writer."""
    wire.transport.num_waiting = num_waiting
    wire.connection.pause_writing()


def drain(wire: Wire, num_waiting: int) -> None:
    """Let the client read until `num_waiting` bytes remain, so that asyncio resumes the writer."""
    wire.transport.num_waiting = num_waiting
    wire.connection.resume_writing()


def test_unread_response_aborts_the_connection(wire: Wire) -> None:
    wire.receive(HEAD + b"\r\n")
    refill(wire, 100_000)
    wire.advance(LIMITS.send_seconds - 1)
    assert wire.end is None

    wire.advance(1)

    assert wire.end == "aborted"


def test_client_that_reads_too_slowly_is_disconnected(wire: Wire) -> None:
    wire.receive(HEAD + b"\r\n")
    refill(wire, 100_000)
    wire.advance(LIMITS.send_seconds / 2)
    wire.transport.num_waiting -= 1

    wire.advance(LIMITS.send_seconds / 2)

    assert wire.end == "aborted"


def test_slow_download_continues_at_any_buffer_level(wire: Wire) -> None:
    """The buffer is larger at each check than when the period began."""
    wire.receive(HEAD + b"\r\n")
    seconds = LIMITS.send_seconds / 5
    refill(wire, 100_000)
    for _ in range(100):
        wire.advance(seconds)
        drain(wire, 10_000)
        refill(wire, 150_000)
    assert wire.end is None


def test_client_that_reads_just_enough_to_resume_is_disconnected(wire: Wire) -> None:
    wire.receive(HEAD + b"\r\n")
    for _ in range(3):
        if wire.end is None:
            refill(wire, 65_537)
            wire.advance(LIMITS.send_seconds * 0.9)
            drain(wire, 16_384)

    assert wire.end == "aborted"


def test_idle_server_time_does_not_count_as_client_delay(wire: Wire) -> None:
    wire.receive(HEAD + b"\r\n")
    for _ in range(20):
        refill(wire, 70_000)
        wire.advance(1)
        drain(wire, 10_000)
        wire.advance(LIMITS.send_seconds)

    assert wire.end is None


def test_client_that_reads_the_minimum_stays_connected(wire: Wire) -> None:
    wire.receive(HEAD + b"\r\n")
    refill(wire, 20 * MIN_RESPONSE_BYTES)
    for _ in range(10):
        wire.transport.num_waiting -= MIN_RESPONSE_BYTES
        wire.advance(LIMITS.send_seconds)
    assert wire.end is None

    wire.transport.num_waiting -= MIN_RESPONSE_BYTES - 1
    wire.advance(LIMITS.send_seconds)

    assert wire.end == "aborted"


def test_unread_end_of_response_aborts_the_connection(wire: Wire) -> None:
    wire.receive(HEAD + b"\r\n")
    asyncio.run(wire.connection.cycle.send({"type": "http.response.start", "status": 204, "headers": []}))
    refill(wire, 100_000)
    wire.connection.flow.resume_writing()  # the last send got through before the buffer was full
    asyncio.run(wire.connection.cycle.send({"type": "http.response.body", "body": b"", "more_body": False}))
    drain(wire, 10_000)

    wire.advance(LIMITS.send_seconds)

    assert wire.transport.ends[-1] == "aborted"


def test_time_between_responses_does_not_count_as_client_delay(wire: Wire) -> None:
    wire.receive(HEAD + b"\r\n")
    asyncio.run(wire.connection.cycle.send({"type": "http.response.start", "status": 204, "headers": []}))
    wire.transport.num_waiting = 20_000
    asyncio.run(wire.connection.cycle.send({"type": "http.response.body", "body": b"", "more_body": False}))
    wire.transport.num_waiting = 0  # the client reads it, and asyncio calls nothing
    wire.receive(HEAD + b"\r\n")
    wire.advance(LIMITS.send_seconds - 3)  # the server works on it
    refill(wire, 100_000)

    wire.advance(LIMITS.send_seconds - 1)
    assert wire.end is None
    wire.advance(1)

    assert wire.end == "aborted"


def test_unread_finished_response_aborts_the_connection(wire: Wire) -> None:
    wire.receive(HEAD + b"\r\n")
    wire.transport.num_waiting = 10  # too little for writing to be paused
    asyncio.run(wire.connection.cycle.send({"type": "http.response.start", "status": 204, "headers": []}))
    asyncio.run(wire.connection.cycle.send({"type": "http.response.body", "body": b"", "more_body": False}))

    wire.advance(LIMITS.send_seconds)

    assert wire.transport.ends == ["closed", "aborted"]  # by uvicorn's keep-alive timeout, then by ours


def test_idle_live_stream_stays_open(wire: Wire) -> None:
    wire.receive(HEAD + b"\r\n")
    wire.connection.pause_writing()  # the buffer is empty
    wire.connection.resume_writing()

    wire.advance(24 * 3600)

    assert wire.end is None


class Impatient(HttpConnection):
    timeouts = Timeouts(header_seconds=2.0, body_seconds=2.0, send_seconds=2.0)


@pytest.mark.parametrize("sent", [b"", HEAD, POST + b"x"], ids=["nothing", "half a header", "half a body"])
def test_server_closes_a_stalled_connection(app: FastAPI, key: str, sent: bytes) -> None:
    with running(app, key, connection=Impatient) as site, closing(connect(site)) as client:
        client.sendall(sent.replace(b"Host: x", b"Host: 127.0.0.1"))

        received = read_to_end(client)

    assert received.startswith(b"HTTP/1.1 408 ") == (sent == HEAD)


def test_connection_limit_allows_many_live_streams(app: FastAPI) -> None:
    config = server_config(app, host="127.0.0.1", port=0, shutdown_seconds=1)

    assert config.limit_concurrency is not None
    assert config.limit_concurrency > 10_000
    assert config.timeout_keep_alive > 0
