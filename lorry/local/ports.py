"""The socket that the API server listens on: at the port that was asked for, or the next free one from the default."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address

from lorry.errors import LorryError

DEFAULT_PORT = 8472
_PORTS_TRIED = 50
_BACKLOG = 4096


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens at `host` and `port`; without `port`, at the next free one from the default on.

    From here on no other process can listen there: the API server gets this socket instead of a number. Raises
    LorryError if the port is in use, or if `host` is no address of this machine.
    """
    if port is not None:
        listening = _open(host, port)
        if listening is None:
            raise LorryError(
                f"Port {port} on {host} is in use.",
                code="port_in_use",
                remedy="Give another one with --port, or none, and the next free one is taken.",
            )
        return listening
    for candidate in range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED):
        listening = _open(host, candidate)
        if listening is not None:
            return listening
    raise LorryError(
        f"The ports {DEFAULT_PORT} to {DEFAULT_PORT + _PORTS_TRIED - 1} on {host} are all in use.",
        code="port_in_use",
        remedy="Give a free one with --port.",
    )


def moved(listening: socket.socket, requested: int | None) -> str | None:
    """The sentence for a user who finds the service at another port than usual; None if it is the usual one."""
    port = listening.getsockname()[1]
    if requested is not None or port == DEFAULT_PORT:
        return None
    return f"Port {DEFAULT_PORT} is in use by another program, perhaps another Lorry: this one listens on {port}."


def url(host: str, listening: socket.socket) -> str:
    """Where a client on this machine finds it.

    A loopback name such as `localhost` becomes the address that is listened on: another process could listen on
    another address of the same name. A socket on every interface is reached by its family's loopback address.
    """
    address, port = listening.getsockname()[:2]
    bound = ip_address(address.partition("%")[0])
    if bound.is_unspecified:
        reachable = "::1" if bound.version == 6 else "127.0.0.1"
    else:
        reachable = str(bound) if bound.is_loopback else host
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _open(host: str, port: int) -> socket.socket | None:
    """None: the port is in use. (A connection that only waits in TIME_WAIT does not use it.)"""
    listening: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)  # at once: until then, another process could bind the same port
    except OSError as error:
        if listening is not None:
            listening.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise LorryError(
            f"Nothing can listen on {host} port {port}: {error.strerror or error}.",
            code="bad_host",
            remedy="--host takes an address of this machine, such as 127.0.0.1 or 0.0.0.0; ports below 1024 need root.",
        ) from error
    return listening
