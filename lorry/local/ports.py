"""Which port the api listens on: the one that was asked for, or the next free one from the default on."""

from __future__ import annotations

import errno
import socket

from lorry.errors import LorryError

DEFAULT_PORT = 8472
_PORTS_TRIED = 50


def choose(host: str, port: int | None) -> int:
    """Raises LorryError where the port asked for is taken, or `host` is no address of this machine."""
    if port is not None:
        if not _is_free(host, port):
            raise LorryError(
                f"Port {port} on {host} is in use.",
                code="port_in_use",
                remedy="Give another one with --port, or none, and the next free one is taken.",
            )
        return port
    for candidate in range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED):
        if _is_free(host, candidate):
            return candidate
    raise LorryError(
        f"The ports {DEFAULT_PORT} to {DEFAULT_PORT + _PORTS_TRIED - 1} on {host} are all in use.",
        code="port_in_use",
        remedy="Give a free one with --port.",
    )


def moved(port: int, asked: int | None) -> str | None:
    """The sentence for a person who finds the service elsewhere than usual; None where it is where it always is."""
    if asked is not None or port == DEFAULT_PORT:
        return None
    return f"Port {DEFAULT_PORT} is in use by another program, perhaps another Lorry: this one listens on {port}."


def url(host: str, port: int) -> str:
    """Where a client on this machine finds it; every interface includes the loopback."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - compared
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _is_free(host: str, port: int) -> bool:
    """True if the api could listen there now. (Like it, reuse what only waits in TIME_WAIT.)"""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise LorryError(
            f"Nothing can listen on {host} port {port}: {error.strerror or error}.",
            code="bad_host",
            remedy="--host takes an address of this machine, such as 127.0.0.1 or 0.0.0.0; ports below 1024 need root.",
        ) from error
    return True
