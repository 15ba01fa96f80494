"""The response of a live stream. It sends the listener's messages until the stream ends or the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.requests.disconnects import disconnected
from api.streaming.hub import Feed, Found, Subscription
from api.streaming.sse import HEADERS


class LiveStream(Response):
    """`first` is the result of the listener's first poll. `identify` raises Unauthorized once access is revoked."""

    def __init__(self, feed: Feed, listener: Subscription, first: Found, identify: Callable[[], object]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._feed = feed
        self._listener = listener
        self._first = first
        self._identify = identify

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        listener = self._listener
        self._feed.enter(listener, self._first, self._identify)
        watch = asyncio.create_task(_end_with_the_client(receive, listener))
        try:
            is_current = False
            while not (listener.ended and not listener.pending):
                if not is_current:
                    is_current = await self._feed.catch_up(listener)
                if is_current or listener.pending:
                    await send({"type": "http.response.body", "body": await listener.take(), "more_body": True})
        finally:
            watch.cancel()
            self._feed.leave(listener)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _end_with_the_client(receive: Receive, listener: Subscription) -> None:
    await disconnected(receive)
    listener.pending.clear()
    listener.end()
