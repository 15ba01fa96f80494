"""The body of one request on its way in: counted, bounded, and read to its end before a refusal is sent.

A client that is still sending when the connection closes would see a reset, and not the reason.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope

DRAIN_BYTES = 2**26
DRAIN_SECONDS = 10.0
"""A client gets this much of a chance to hear why it was refused."""


class RequestBody:
    def __init__(self, scope: Scope, receive: Receive, *, max_bytes: int | None) -> None:
        """`max_bytes` None: somebody else counts."""
        self._receive = receive
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._ended = False
        self._waits_to_send = Headers(scope=scope).get("expect", "").lower() == "100-continue"

    async def receive(self) -> Message:
        """Raises HTTPException(413) for what is too large: Content-Length may lie or be absent."""
        message = await self._next()
        if self._max_bytes is not None and self._num_bytes > self._max_bytes:
            raise HTTPException(413)
        return message

    async def drain(self) -> None:
        """Read on, within bounds. A client that waits to be asked for its body is not asked."""
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
