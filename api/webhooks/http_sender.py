"""One webhook request: to an address that was checked, with no redirect and no proxy, in bounded time and memory.

The host is resolved here, every address of it is checked, and the connection goes to a checked one: a name that
resolves otherwise a moment later changes nothing.
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
from catalog.webhooks.url_policy import OPENED, Rules, WebhookTarget, target_of, why_shut

TRY_SECONDS = 15.0
"""For all of a try: name, connection, request and reply."""
REPLY_BYTES = 500
MAX_ADDRESSES = 3
"""Of a host, that are tried until one takes a connection."""
MAX_TESTS = 16
TESTS_OF_PROJECT = 4
"""That people ask for, at the same time; further ones wait."""
USER_AGENT = f"lorry-webhooks/{lorry_version()}"
CONNECTED = "connection.connect_tcp.complete"
"""httpcore's name of the moment."""


class NotSent(Exception):
    """Why no request was made, as a sentence."""


class _Progress:
    """How far a try has come."""

    def __init__(self) -> None:
        self.is_connected = False

    async def trace(self, event: str, _info: Mapping[str, Any]) -> None:
        """httpcore's extension."""
        self.is_connected = self.is_connected or event == CONNECTED


class WebhookSender:
    """`lookup` and `trusted` stand in for the system's names and certificates, in tests."""

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
        """Never raises for what the other side, or the network, does."""
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
            error = f"There was no whole answer within {self._try_seconds:g} seconds."
        except NotSent as refusal:
            error = str(refusal)
        except InvalidRequest as refusal:
            error = refusal.sentence()
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as failure:
            error = f"The request failed: {str(failure) or type(failure).__name__}."
        is_saturated = was_saturated or self.resolver.is_saturated(project_id)
        return DeliveryResult(
            started_at=started_at,
            seconds=time.monotonic() - begun,
            error=escaped(error.encode()),
            says_of_endpoint=progress.is_connected or not is_saturated,
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
        """Raises NotSent where one of them is shut: who has such a one among others is trying something."""
        try:
            texts = await self.resolver.resolve(target.host, target.port, project_id=project_id)
        except NoAddress:
            raise NotSent(f"The host {target.host} has no address.") from None
        found = [ip_address(text) for text in texts]
        for address in found:
            if why := why_shut(address, self.rules):
                raise NotSent(f"The host {target.host} {why}, so nothing was sent. {OPENED}")
        return [str(address) for address in found[:MAX_ADDRESSES]]

    async def _ask(
        self, target: WebhookTarget, address: str, body: bytes, headers: Mapping[str, str], progress: _Progress
    ) -> tuple[int, bytes, float | None]:
        """A connection of its own: a shared one would be known by its address alone, whatever its certificate says."""
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
    """The first bytes, as they came: what is compressed stays so."""
    begun = b""
    async for chunk in response.aiter_raw():
        begun += chunk[:REPLY_BYTES]
        if len(begun) >= REPLY_BYTES:
            break
    return begun[:REPLY_BYTES]


def escaped(text: bytes) -> str:
    """Printable text, whatever the bytes are."""
    told = text.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in told)


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds, from a number or a date; None where it is neither."""
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
