"""Sends one webhook request to a checked address, without redirects or proxies, in bounded time and memory.

The host is resolved here, all its addresses are checked, and the connection goes to a checked one. So a name that
resolves differently a moment later (DNS rebinding) has no effect.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any

import httpx

from api.rate_limits.project_slots import ProjectSlots
from api.webhooks.name_resolver import Lookup, NameResolver, NoAddress, system_lookup
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
