"""Detects that the client of a request has disconnected, so that work without a recipient can stop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from starlette.types import Receive


@asynccontextmanager
async def watched(receive: Receive) -> AsyncGenerator[threading.Event]:
    """Yield an event that is set when the client disconnects. The body of the request must have been read."""
    gone = threading.Event()
    watch = asyncio.create_task(set_when_disconnected(receive, gone))
    try:
        yield gone
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


async def disconnected(receive: Receive) -> None:
    """Return when the client disconnects. The body of the request must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def set_when_disconnected(receive: Receive, gone: threading.Event | asyncio.Event) -> None:
    """Set the event when the client disconnects. The body of the request must have been read."""
    await disconnected(receive)
    gone.set()
