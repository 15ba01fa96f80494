"""The HTTP server: reports its address when ready, limits connections, and stops in bounded time with streams open.

A client that sends or reads too slowly is disconnected. uvicorn limits only the wait between two requests. This module
also limits headers that never end, a body that trickles in, and a response that the client does not read.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.app import create_app
from api.deps import Services
from api.settings import ApiSettings
from catalog import tracing
from catalog.error_texts import ErrorText
from catalog.errors import InvalidRequest
from catalog.processes import deny_inspection
from catalog.settings import Settings

MAX_CONNECTIONS = 16_384
"""Maximum number of connections; uvicorn answers 503 beyond it. Each live stream is one. One process has been
measured with 10,000 (docs/benchmarks.md)."""
KEEP_ALIVE_SECONDS = 5
"""Maximum idle time of a connection between two requests."""


SWITCH_SECONDS = 0.002
"""Interval after which Python switches threads. A request releases the interpreter lock at each statement, then waits
behind every thread that computes. With Python's default of 5 ms, a few large requests delayed all others by half a
second. With 0.5 ms, requests next to busy threads were slower too, because the threads switched too often."""
MIN_BODY_BYTES = 2**14
"""Bytes of a body that a client must send within `body_seconds`, unless the body ends earlier."""
MIN_RESPONSE_BYTES = 2**18
"""Bytes of a response that a client must receive within `send_seconds` of waiting, unless it receives all waiting
bytes earlier. asyncio resumes a writer after 48 KiB, so one resumption is not enough."""
log = logging.getLogger("lorry.api")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Time limits of a client."""

    header_seconds: float = 20.0
    """Time from the connection, or from the first byte of a further request, to the end of the request's headers."""
    body_seconds: float = 60.0
    """Time for each MIN_BODY_BYTES of a request's body, counted while this process reads."""
    send_seconds: float = 60.0
    """Time for each MIN_RESPONSE_BYTES of a response, counted while bytes wait to be sent."""


class HttpConnection(H11Protocol):
    """uvicorn's HTTP protocol with `Timeouts`."""

    timeouts = Timeouts()

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self._num_received = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._wait_began_at = 0.0
        self._num_waiting = 0
        """Bytes that waited to be sent when the timer started."""
        self._seconds_waited = 0.0
        self._num_taken = 0
        """Bytes that the client received in this period of `send_seconds` before the timer started."""
        self._is_of_ended_response = False
        """Whether the period began with the end of a response. The last bytes of that response may have waited."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(self.timeouts.header_seconds, self._header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_header_timer()
        self._cancel_body_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_received += len(data)
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_request()
        self._begin_send_period()
        self._watch_response()
        self._is_of_ended_response = True

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._is_of_ended_response:  # since then, the connection was idle or carried another response
            self._begin_send_period()
        self._watch_response()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_send_timer()
        if self.cycle.response_complete:
            self._watch_response()

    def _watch_request(self) -> None:
        """Start and stop the timers of headers and body by the state of the request."""
        state = self.conn.their_state
        if state is h11.IDLE and self.conn.trailing_data[0]:
            if self._header_timer is None:
                self._header_timer = self.loop.call_later(self.timeouts.header_seconds, self._header_timeout)
        elif state is not h11.IDLE:
            self._cancel_header_timer()
        if state is not h11.SEND_BODY:
            self._cancel_body_timer()
        elif self._body_timer is None:
            self._start_body_timer()

    def _header_timeout(self) -> None:
        self._header_timer = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._send_408()
        self._close("headers", is_abrupt=False)

    def _send_408(self) -> None:
        text = ErrorText.of("request_timeout", seconds=self.timeouts.header_seconds)
        error = {**text.report(), "message": text.sentence(), "type": "invalid_request_error", "param": None}
        body = json.dumps({"error": error}).encode("ascii")
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        response = h11.Response(status_code=408, headers=headers, reason=b"Request Timeout")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def _start_body_timer(self) -> None:
        self._body_timer = self.loop.call_later(self.timeouts.body_seconds, self._check_body, self._num_received)

    def _check_body(self, num_received: int) -> None:
        """Close the connection if too few bytes arrived. Time in which this process did not read does not count."""
        is_reading = not self.flow.read_paused and not self.cycle.waiting_for_100_continue
        if is_reading and self._num_received - num_received < MIN_BODY_BYTES:
            self._body_timer = None
            self._close("body")
        else:
            self._start_body_timer()

    def _watch_response(self) -> None:
        """Start the timer while bytes wait. Time in which this process produces nothing does not count."""
        self._stop_send_timer()
        self._num_waiting = self.transport.get_write_buffer_size()
        if self._num_waiting:
            self._wait_began_at = self.loop.time()
            remaining = self.timeouts.send_seconds - self._seconds_waited
            self._send_timer = self.loop.call_later(max(0.0, remaining), self._check_response)

    def _stop_send_timer(self) -> None:
        """Stop the timer and add up the bytes received. While the timer runs, no bytes are added to the buffer: writing
        is paused, or the response is complete. So the client has received what the buffer shrank by."""
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
            self._seconds_waited += self.loop.time() - self._wait_began_at
            self._num_taken += max(0, self._num_waiting - self.transport.get_write_buffer_size())

    def _begin_send_period(self) -> None:
        self._stop_send_timer()
        self._is_of_ended_response = False
        self._seconds_waited, self._num_taken = 0.0, 0

    def _check_response(self) -> None:
        self._stop_send_timer()
        is_slow = self._num_taken < MIN_RESPONSE_BYTES and self.transport.get_write_buffer_size() > 0
        if is_slow and (self.flow.write_paused or self.cycle.response_complete):
            self._close("response")
        else:
            self._begin_send_period()
            self._is_of_ended_response = self.cycle.response_complete
            self._watch_response()

    def _close(self, reason: str, *, is_abrupt: bool = True) -> None:
        """Close the connection. An abrupt close discards unsent bytes; a normal close would wait for them."""
        address = self.client[0] if self.client else None
        log.info("closed a connection that made no progress: part=%s address=%s", reason, address)
        if is_abrupt:
            self.transport.abort()
        else:
            self.transport.close()

    def _cancel_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _cancel_body_timer(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None


class Server(uvicorn.Server):
    """A uvicorn server that ends the live streams before uvicorn waits for their connections to close."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self.announce(address_of(host, port))

    def announce(self, url: str) -> None:
        """Print the address for the process that started this one, in the format of JSON logs."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": "info",
            "logger": __name__,
            "message": f"ready url={url}",
            "event": "ready",
            "url": url,
        }
        print(json.dumps(line), flush=True)  # noqa: T201

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._services.feed.close()
        await super().shutdown(sockets)


def serve(settings: Settings, *, host: str, port: int, listen_fd: int | None = None) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status.

    `port` 0 selects any free port. `listen_fd` is an inherited socket that is already listening at `host`; `port` is
    then unused.
    """
    sockets = None if listen_fd is None else [_inherited(listen_fd)]
    deny_inspection()
    sys.setswitchinterval(SWITCH_SECONDS)
    _allow_many_connections()
    own = ApiSettings()
    app = create_app(settings, own, bound_host=host)
    _collect_garbage_rarely()
    config = server_config(app, host=host, port=port, shutdown_seconds=own.shutdown_seconds)
    for name in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again after a clean shutdown
        signal.signal(name, _ended)
    tracing.start("api")
    try:
        Server(config, app.state.services).run(sockets)
    finally:
        tracing.stop()
    return 0


def server_config(
    app: FastAPI, *, host: str, port: int, shutdown_seconds: int, connection: type[HttpConnection] = HttpConnection
) -> uvicorn.Config:
    """Return uvicorn's configuration. `connection` is the protocol class with the timeouts of a connection."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        loop="asyncio",  # explicit, because uvloop has other limits and other log lines
        http=connection,
        ws="none",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=shutdown_seconds,
        h11_max_incomplete_event_size=64 * 1024,
        backlog=4096,
    )


def address_of(host: str, port: int) -> str:
    """Return the URL of a bound address. A wildcard address becomes the loopback address."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  (compared, not bound)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _inherited(listen_fd: int) -> socket.socket:
    """Raises InvalidRequest if the descriptor is not a socket of this process."""
    try:
        return socket.socket(fileno=listen_fd)
    except OSError as error:
        raise InvalidRequest("invalid_listen_fd", listen_fd=listen_fd, strerror=str(error.strerror or error)) from error


def _collect_garbage_rarely() -> None:
    """Make full garbage collections rare. Each one stops every thread for 0.4 s with a thousand streams.

    With Python's default thresholds, one happens every ten seconds under load; with these, one every few minutes.
    Reference counting frees almost all objects. The 230,000 objects that exist by now are frozen and never visited.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def _allow_many_connections() -> None:
    """Raise the limit of open files to the hard limit: each live stream is one open file."""
    if sys.platform == "win32":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS reports an unlimited hard limit and then rejects it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _ended(_number: int, _frame: FrameType | None) -> None:
    sys.stderr.flush()
