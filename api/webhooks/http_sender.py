"""Sends one webhook request to a checked address, without redirects or proxies, in bounded time and memory.

The host is resolved here, all its addresses are checked, and the connection goes to a checked one. So a name that
resolves differently a moment later (DNS rebinding) has no effect. The system's resolver may take half a minute for a
name whose servers do not answer, and can't be interrupted. Such names block only the threads of their own project.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any

import httpx

from api.rate_limits.threads import ProjectSlots
from catalog.errors import InvalidRequest
from catalog.fleet.compatibility import lorry_version
from catalog.webhooks.delivery_queue import DeliveryResult
from catalog.webhooks.url_policy import OPENED, Rules, WebhookTarget, blocked_address, target_of

TRY_SECONDS = 15.0
"""Timeout of a whole attempt: name resolution, connection, request and reply."""
REPLY_BYTES = 500
MAX_ADDRESSES = 3
"""Maximum number of a host's addresses that are tried until one accepts the connection."""
MAX_TESTS = 16
TESTS_OF_PROJECT = 4
"""Maximum number of concurrent test requests; further ones wait."""
USER_AGENT = f"lorry-webhooks/{lorry_version()}"
CONNECTED = "connection.connect_tcp.complete"
"""httpcore's name of the trace event."""
MAX_LOOKUPS = 32
LOOKUPS_OF_PROJECT = 4
ABSENT_SECONDS = 60.0
MAX_ABSENT = 4096
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
_Name = tuple[str, str, int]
"""Project, host, port. Projects share no results, so that none can observe or delay the lookups of another."""


class NoAddress(Exception):
    """The host has no address."""


async def system_lookup(host: str, port: int) -> Sequence[str]:
    """Return all addresses of a host from the system's resolver. Raises OSError, UnicodeError.

    The thread is a daemon, so that the process does not wait for it at exit, as it would for an executor's thread.
    """
    future: Future[list[str]] = Future()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            future.set_result(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except Exception as error:  # noqa: BLE001  (raised where the future is awaited)
            future.set_exception(error)

    threading.Thread(target=look_up, name="name lookup", daemon=True).start()
    return await asyncio.wrap_future(future)


class NameResolver:
    """Resolves names. In tests, `lookup` replaces the system's resolver, and `clock` replaces time.monotonic."""

    def __init__(self, lookup: Lookup = system_lookup, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lookup = lookup
        self._clock = clock
        self._slots = ProjectSlots(MAX_LOOKUPS, per_project=LOOKUPS_OF_PROJECT)
        self._running: dict[_Name, asyncio.Task[Sequence[str]]] = {}
        self._absent_until: dict[_Name, float] = {}

    async def resolve(self, host: str, port: int, *, project_id: str) -> Sequence[str]:
        """Return the host's addresses, at least one. Raises NoAddress.

        If a caller gives up, the lookup keeps running in its slot and serves the next caller with the same name.
        """
        name = (project_id, host, port)
        if self._absent_until.get(name, 0.0) > self._clock():
            raise NoAddress
        task = self._running.get(name)
        if task is None:
            task = self._running[name] = asyncio.create_task(self._ask(name))
            task.add_done_callback(lambda _: self._running.pop(name, None))
        found = await asyncio.shield(task)
        if not found:
            raise NoAddress
        return found

    def is_saturated(self, project_id: str) -> bool:
        """Return whether another lookup of the project would have to wait."""
        return self._slots.is_full(project_id)

    async def _ask(self, name: _Name) -> Sequence[str]:
        """Return the addresses; empty if the name has none."""
        project_id, host, port = name
        async with self._slots.slot(project_id):
            try:
                found = await self._lookup(host, port)
            except (OSError, UnicodeError):
                found = ()
        if not found:
            self._note_absent(name)
        return found

    def _note_absent(self, name: _Name) -> None:
        """Remember that the name has no address. If there are too many names, the oldest are dropped."""
        now = self._clock()
        self._absent_until = {name: until for name, until in self._absent_until.items() if until > now}
        while len(self._absent_until) >= MAX_ABSENT:
            del self._absent_until[next(iter(self._absent_until))]
        self._absent_until[name] = now + ABSENT_SECONDS


class NotSent(Exception):
    """Reason why no request was sent, as a sentence."""


class _Progress:
    """Progress of an attempt."""

    def __init__(self) -> None:
        self.is_connected = False

    async def trace(self, event: str, _info: Mapping[str, Any]) -> None:
        """httpcore's trace callback."""
        self.is_connected = self.is_connected or event == CONNECTED


class WebhookSender:
    """Sends webhook requests. In tests, `lookup` and `trusted` replace the system's resolver and certificates."""

    def __init__(
        self,
        rules: Rules,
        *,
        lookup: Lookup = system_lookup,
        trusted: ssl.SSLContext | None = None,
        try_seconds: float = TRY_SECONDS,
    ) -> None:
        self.rules = rules
        self.resolver = NameResolver(lookup)
        self._trusted = trusted or httpx.create_ssl_context()
        self._try_seconds = try_seconds
        self.tests = ProjectSlots(MAX_TESTS, per_project=TESTS_OF_PROJECT)

    async def send(self, url: str, *, project_id: str, body: bytes, headers: Mapping[str, str]) -> DeliveryResult:
        """Send a request. Failures of the endpoint or the network are returned, not raised."""
        started_at, begun, progress = time.time(), time.monotonic(), _Progress()
        was_saturated = self.resolver.is_saturated(project_id)
        try:
            async with asyncio.timeout(self._try_seconds):
                addresses = await self._checked_addresses(target := target_of(url, self.rules), project_id)
                status_code, reply, retry_after = await self._request(target, addresses, body, headers, progress)
            return DeliveryResult(
                started_at=started_at,
                seconds=time.monotonic() - begun,
                status_code=status_code,
                reply=escaped(reply),
                retry_after=retry_after,
            )
        except TimeoutError:
            error = f"The endpoint did not answer completely within {self._try_seconds:g} seconds."
        except NotSent as refusal:
            error = str(refusal)
        except InvalidRequest as refusal:
            error = refusal.sentence()
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as failure:
            error = f"The request failed: {(str(failure) or type(failure).__name__).rstrip('.')}."
        is_saturated = was_saturated or self.resolver.is_saturated(project_id)
        return DeliveryResult(
            started_at=started_at,
            seconds=time.monotonic() - begun,
            error=escaped(error.encode()),
            concerns_endpoint=progress.is_connected or not is_saturated,
        )

    async def _request(
        self,
        target: WebhookTarget,
        addresses: Sequence[str],
        body: bytes,
        headers: Mapping[str, str],
        progress: _Progress,
    ) -> tuple[int, bytes, float | None]:
        last = len(addresses) - 1
        for number, address in enumerate(addresses):
            try:
                return await self._ask(target, address, body, headers, progress)
            except httpx.ConnectError:
                if number == last:
                    raise
        raise AssertionError("there is an address")

    async def _checked_addresses(self, target: WebhookTarget, project_id: str) -> list[str]:
        """Raises NotSent if any address of the host is blocked: a host with such an address is probably an attack."""
        try:
            texts = await self.resolver.resolve(target.host, target.port, project_id=project_id)
        except NoAddress:
            raise NotSent(f"The host {target.host} has no address.") from None
        found = [ip_address(text) for text in texts]
        for address in found:
            if blocked := blocked_address(address, self.rules):
                raise NotSent(
                    f"Nothing was sent, because the host {target.host} resolves to {blocked}, which is not a public IP "
                    f"address. {OPENED}"
                )
        return [str(address) for address in found[:MAX_ADDRESSES]]

    async def _ask(
        self, target: WebhookTarget, address: str, body: bytes, headers: Mapping[str, str], progress: _Progress
    ) -> tuple[int, bytes, float | None]:
        """Send the request on a new connection. A connection pool would identify connections by address alone, and so
        reuse one that was verified for another host's certificate."""
        shown = f"[{address}]" if ":" in address else address
        sent = {"host": target.authority, "user-agent": USER_AGENT, "accept-encoding": "identity", **headers}
        transport = httpx.AsyncHTTPTransport(verify=self._trusted, trust_env=False, retries=0)
        async with httpx.AsyncClient(
            transport=transport, trust_env=False, follow_redirects=False, timeout=self._try_seconds
        ) as client:
            request = client.build_request(
                "POST",
                f"{target.scheme}://{shown}:{target.port}{target.path}",
                content=body,
                headers=sent,
                extensions={"sni_hostname": target.host, "trace": progress.trace},
            )
            response = await client.send(request, stream=True)
            try:
                return response.status_code, await _beginning(response), _retry_after(response.headers)
            finally:
                await response.aclose()


async def _beginning(response: httpx.Response) -> bytes:
    """Return the first raw bytes of the reply; compressed content is not decompressed."""
    begun = b""
    async for chunk in response.aiter_raw():
        begun += chunk[:REPLY_BYTES]
        if len(begun) >= REPLY_BYTES:
            break
    return begun[:REPLY_BYTES]


def escaped(text: bytes) -> str:
    """Return the bytes as printable text."""
    decoded = text.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in decoded)


def _retry_after(headers: httpx.Headers) -> float | None:
    """Return the seconds given as a number or a date; None for any other value."""
    text = headers.get("retry-after", "").strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
