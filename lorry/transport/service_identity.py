"""Verifies that a local server is the user's own Lorry service before an API key is sent to it.

Each new connection begins with a challenge. The client sends a nonce. The server answers with an HMAC over the nonce
and over the address and port of this connection, keyed with the secret of `connection.json`.
docs/explanation/security-model.md explains the threat.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import IPv6Address, ip_address
from typing import Any, cast

import httpcore
import httpx

from lorry.errors import ServiceNotVerified

PATH = "/v1/service_identity"
_LONGEST_ANSWER_BYTES = 4096
_HANDSHAKE_SECONDS = 5.0
_BUSY = frozenset({429, 502, 503, 504})
"""Statuses of a service that can't answer at the moment: the connection may be retried."""


def expected_proof(secret: str, *, nonce: str, host: str, port: int) -> str:
    """Return the HMAC that the service must answer on a connection to `host` and `port`."""
    text = f"lorry service identity\n{nonce}\n{_canonical(host)}\n{port}"
    return hmac.new(secret.encode("ascii"), text.encode(), hashlib.sha256).hexdigest()


class VerifiedTransport(httpx.BaseTransport):
    """An HTTP transport that sends requests only over connections whose server has proved its identity.

    Raises ServiceNotVerified, and httpx.TransportError in the same cases as httpx.
    """

    def __init__(self, secret: str) -> None:
        self._pool = httpcore.ConnectionPool(
            max_connections=100,
            max_keepalive_connections=20,
            keepalive_expiry=5.0,
            network_backend=_VerifyingBackend(secret),
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        content = cast("Iterable[bytes]", request.stream)
        sent = httpcore.Request(
            request.method, url, headers=request.headers.raw, content=content, extensions=request.extensions
        )
        with _httpx_errors():
            response = self._pool.handle_request(sent)
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_Body(response),
            extensions=dict(cast("Mapping[str, Any]", response.extensions)),  # pyright: ignore[reportUnknownMemberType]
        )

    def close(self) -> None:
        self._pool.close()


class _Body(httpx.SyncByteStream):
    """The body of a response. It raises httpx's exceptions."""

    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        with _httpx_errors():
            yield from self._response.iter_stream()

    def close(self) -> None:
        with _httpx_errors():
            self._response.close()


class _VerifyingBackend(httpcore.NetworkBackend):
    """Opens TCP connections and returns only those that passed the challenge."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        stream = self._backend.connect_tcp(host, port, timeout, local_address, socket_options)
        try:
            self._challenge(stream, host, port, min(timeout or _HANDSHAKE_SECONDS, _HANDSHAKE_SECONDS))
        except BaseException:
            stream.close()
            raise
        return stream

    def _challenge(self, stream: httpcore.NetworkStream, host: str, port: int, seconds: float) -> None:
        """Exchange nonce and proof on the new connection, which stays open for the following requests."""
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            peer_host, peer_port = stream.get_extra_info("server_addr")[:2]
        except OSError as error:  # the server has already closed the connection
            raise httpcore.ConnectError(str(error)) from error
        nonce = secrets.token_hex(32)
        exchange = httpcore.HTTP11Connection(
            origin=httpcore.Origin(scheme=b"http", host=host.encode("ascii"), port=port), stream=stream
        )
        with exchange.stream(
            "GET",
            f"http://{authority}{PATH}?nonce={nonce}",
            headers={"Host": authority, "Accept": "application/json"},
            extensions={"timeout": {"read": seconds, "write": seconds}},
        ) as response:
            body = _bounded(response)
        if response.status in _BUSY:
            raise httpcore.ConnectError(f"it returned status {response.status} for the identity check")
        expected = expected_proof(self._secret, nonce=nonce, host=peer_host, port=peer_port)
        if response.status != 200 or not hmac.compare_digest(_parse_proof(body), expected.encode("ascii")):
            raise _not_verified(authority)
        if exchange.is_closed():  # `Connection: close`: the server accepts no further request
            raise httpcore.ConnectError("it closed the connection after the identity check, so it is shutting down")


def _bounded(response: httpcore.Response) -> bytes:
    body = b""
    for chunk in response.iter_stream():
        body += chunk
        if len(body) > _LONGEST_ANSWER_BYTES:
            return b""
    return body


def _parse_proof(body: bytes) -> bytes:
    """Return the proof in the response; empty for any other response."""
    try:
        parsed: object = json.loads(body)
    except (ValueError, RecursionError):
        return b""
    found = cast("dict[str, Any]", parsed).get("proof") if isinstance(parsed, dict) else None
    return found.encode("utf-8", "replace") if isinstance(found, str) else b""


def _canonical(host: str) -> str:
    """Return the canonical spelling of an IP address. An IPv4-mapped IPv6 address becomes the IPv4 address."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    return str((address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address)


def _not_verified(authority: str) -> ServiceNotVerified:
    return ServiceNotVerified("service_not_verified", authority=authority)


@contextmanager
def _httpx_errors() -> Generator[None]:
    """Convert httpcore's exceptions to those of httpx, which have the same names."""
    try:
        yield
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
        kind: type[httpx.TransportError] = getattr(httpx, type(error).__name__, httpx.TransportError)
        raise kind(str(error)) from error
