"""The HTTP server: reports its address when ready, limits connections, and stops in bounded time with streams open."""

from __future__ import annotations

import gc
import json
import signal
import socket
import sys
from contextlib import suppress
from datetime import UTC, datetime
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
"""Maximum number of connections; uvicorn answers 503 beyond it. Each live stream is one. One process has been
measured with 10,000 (docs/benchmarks.md)."""
KEEP_ALIVE_SECONDS = 5
"""Maximum idle time of a connection between two requests."""


SWITCH_SECONDS = 0.002
"""Interval after which Python switches threads. A request releases the interpreter lock at each statement, then waits
behind every thread that computes. With Python's default of 5 ms, a few large requests delayed all others by half a
second. With 0.5 ms, requests next to busy threads were slower too, because the threads switched too often."""


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
