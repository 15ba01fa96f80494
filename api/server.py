"""Listening: reports its address when it is ready, limits connections, and stops in bounded time with streams open."""

from __future__ import annotations

import gc
import json
import signal
import socket
import sys
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.deps import Services
from api.middleware.connections import HttpConnection
from api.settings import ApiSettings
from catalog import tracing
from catalog.errors import InvalidRequest
from catalog.process_inspection import deny_inspection
from catalog.settings import Settings

MAX_CONNECTIONS = 16_384
"""Beyond it uvicorn answers 503. Each live stream is one: 10,000 on one process are measured by `make bench-api`."""
KEEP_ALIVE_SECONDS = 5
"""How long a connection may wait between two requests."""


SWITCH_SECONDS = 0.002
"""Interval after which Python switches threads. A request releases the interpreter lock at each statement, then waits
behind every thread that computes. With Python's default of 5 ms, a few large requests delayed all others by half a
second. With 0.5 ms, requests next to busy threads were slower too, because the threads switched too often."""


class Server(uvicorn.Server):
    """uvicorn's, which waits for connections to close before anybody tells the streams to end."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self.announce(address_of(host, port))

    def announce(self, url: str) -> None:
        """For who started this process."""
        print(json.dumps({"event": "ready", "url": url}), flush=True)  # noqa: T201

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._services.feed.close()
        await super().shutdown(sockets)


def serve(settings: Settings, *, host: str, port: int, listen_fd: int | None = None) -> int:
    """Until SIGTERM or SIGINT. Returns the exit status.

    port: 0 is any that is free. listen_fd: an inherited socket that listens at `host` already; `port` is unused then.
    """
    sockets = None if listen_fd is None else [_inherited(listen_fd)]
    deny_inspection()
    sys.setswitchinterval(SWITCH_SECONDS)
    _allow_many_connections()
    own = ApiSettings()
    app = create_app(settings, own, bound_host=host)
    _collect_garbage_rarely()
    config = server_config(app, host=host, port=port, shutdown_seconds=own.shutdown_seconds)
    for name in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again once it has ended well
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
    """`connection`: what has the limits in time of one connection."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        loop="asyncio",  # not whichever is installed: uvloop's limits and its log differ
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
    """The URL of a bound address; an address of every interface is told as this machine's own."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  (compared, not bound)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _inherited(listen_fd: int) -> socket.socket:
    """Raises InvalidRequest if the descriptor is no socket of this process."""
    try:
        return socket.socket(fileno=listen_fd)
    except OSError as error:
        raise InvalidRequest(
            f"File descriptor {listen_fd} is not an open socket: {error.strerror}.",
            code="invalid_listen_fd",
            remedy="Let the parent process pass a listening socket, or leave --listen-fd out and give --port.",
        ) from error


def _collect_garbage_rarely() -> None:
    """A full collection stops every thread for as long as it takes to visit all objects: 0.4 s with a thousand streams.

    With Python's own thresholds there is one in ten seconds under load; with these, one in some minutes. Almost all
    objects are freed by their reference counts. What exists by now, 230,000 objects, is never visited again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def _allow_many_connections() -> None:
    """As many open files as this process may ask for: each live stream is one."""
    if sys.platform == "win32":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS calls without limit what it does not give
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _ended(_number: int, _frame: FrameType | None) -> None:
    sys.stderr.flush()
