"""The API server's listening socket, at the requested port or at the next free one from the default."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address

from lorry.errors import LorryError

DEFAULT_PORT = 8472
_PORTS_TRIED = 50
_BACKLOG = 4096


def listen(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens at `host` and `port`; without `port`, at the next free one from the default.

    From now on no other process can listen there: the API server receives the socket instead of a port number. Raises
    LorryError if the port is in use, or if `host` is not an address of this machine.
    """
    if port is not None:
        listener = _open(host, port)
        if listener is None:
            raise LorryError("port_in_use", port=port, host=host)
        return listener
    for candidate in range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED):
        listener = _open(host, candidate)
        if listener is not None:
            return listener
    raise LorryError("default_ports_in_use", first=DEFAULT_PORT, last=DEFAULT_PORT + _PORTS_TRIED - 1, host=host)


def free(host: str, first: int) -> int:
    """Return the first port from `first` on that is free now. Raises LorryError."""
    for candidate in range(first, first + _PORTS_TRIED):
        if is_free(host, candidate):
            return candidate
    raise LorryError("last_ports_in_use", first=first, last=first + _PORTS_TRIED - 1, host=host)


def is_free(host: str, port: int) -> bool:
    listener = _open(host, port)
    if listener is not None:
        listener.close()
    return listener is not None


def moved(listener: socket.socket, requested: int | None) -> str | None:
    """Return a message for the user if the service listens on an unusual port, else None."""
    return moved_to(listener.getsockname()[1], requested)


def moved_to(port: int, requested: int | None) -> str | None:
    """Return the message of `moved` for a service at this port."""
    if requested is not None or port == DEFAULT_PORT:
        return None
    return f"Port {DEFAULT_PORT} is in use by another program, perhaps another Lorry. Using port {port} instead."


def url(host: str, listener: socket.socket) -> str:
    """Return the URL under which a client on this machine reaches the socket.

    A loopback name such as `localhost` becomes the bound address, because another process could listen on another
    address of the same name. A wildcard address becomes the loopback address of its family.
    """
    address, port = listener.getsockname()[:2]
    bound = ip_address(address.partition("%")[0])
    if bound.is_unspecified:
        reachable = "::1" if bound.version == 6 else "127.0.0.1"
    else:
        reachable = str(bound) if bound.is_loopback else host
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _open(host: str, port: int) -> socket.socket | None:
    """Return a listening socket; None if the port is in use. (A connection in TIME_WAIT does not use it.)"""
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)  # immediately: until then, another process could bind the same port
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            return None
        needs_root = error.errno == errno.EACCES
        raise LorryError(
            "port_needs_root" if needs_root else "bad_host", host=host, port=port, strerror=str(error.strerror or error)
        ) from error
    return listener
