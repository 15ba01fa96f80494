"""Host names of the API server, security headers, and limits of request bodies.

Requests for other host names are rejected, which defeats DNS rebinding. An IP address in the Host header can't be
rebound, so any address is accepted if the API server listens on every interface.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, kw_only=True, slots=True)
class HostPolicy:
    names: frozenset[str]
    any_address: bool
    """Whether the API server listens on every interface."""

    def admits(self, host_header: str) -> bool:
        name = host_name(host_header)
        return name in self.names or (self.any_address and _is_address(name))


def host_policy(*, bound_host: str, named: list[str]) -> HostPolicy:
    """Admit loopback, the bound address, this machine's name unless bound to loopback, and `named`."""
    bound = bound_host.strip("[]").lower()
    any_address = bound in ("0.0.0.0", "::", "")  # noqa: S104  (compared, not bound)
    names = LOOPBACK_NAMES | {bound} | set(named)
    if bound not in LOOPBACK_NAMES:
        names |= {socket.gethostname().lower()}
    return HostPolicy(names=frozenset(names - {""}), any_address=any_address)


def host_name(host_header: str) -> str:
    """Return the name in a Host header or an origin's authority, without port and brackets."""
    text = host_header.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if ":" in text else text


def is_loopback(address: str) -> bool:
    return address == "localhost" or (_is_address(address) and ipaddress.ip_address(address).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


DASHBOARD_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
DATA_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""Responses of the API are never rendered as pages."""


def security_headers(path: str) -> dict[str, str]:
    is_page = path.startswith("/dashboard")
    headers = {
        "content-security-policy": DASHBOARD_POLICY if is_page else DATA_POLICY,
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }
    if not is_page:
        headers["cache-control"] = "no-store"
    return headers


DRAIN_BYTES = 2**26
DRAIN_SECONDS = 10.0
"""Bytes and time for which the body of a rejected request is still read, so that the client can read the response."""


class RequestBody:
    def __init__(self, scope: Scope, receive: Receive, *, max_bytes: int | None) -> None:
        """`max_bytes` None: the route enforces the limit."""
        self._receive = receive
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._ended = False
        self._waits_to_send = Headers(scope=scope).get("expect", "").lower() == "100-continue"

    async def receive(self) -> Message:
        """Raises HTTPException(413) for a body that is too large: Content-Length may be wrong or absent."""
        message = await self._next()
        if self._max_bytes is not None and self._num_bytes > self._max_bytes:
            raise HTTPException(413, f"The request body exceeds the limit of {self._max_bytes:,} bytes.")
        return message

    async def drain(self) -> None:
        """Read the rest of the body, within bounds. A client that waits for `100 Continue` has not sent a body."""
        if self._waits_to_send and not self._num_bytes:
            return
        end = self._num_bytes + DRAIN_BYTES
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._ended and self._num_bytes < end:
                    await self._next()
        except TimeoutError:
            return

    async def _next(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        self._ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message
