"""Live streams: one task looks at the database for every listener of this process, and hands out what is new.

A listener costs no thread and no connection while it waits. One that reads slowly is simply not looked for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from api.sse import COMMENT
from catalog.errors import LorryError

MAX_STREAM_SECONDS = 3600.0
"""A stream ends after this long; the client comes back with its key and its Last-Event-ID."""
RECHECK_SECONDS = 60.0
"""A key that is revoked, or a browser that signed out, is looked for this often while a stream is open."""
log = logging.getLogger("lorry.api")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What one look brought: messages in wire form, and whether the stream is over."""

    messages: list[bytes] = field(default_factory=list[bytes])
    is_last: bool = False


Look = Callable[[], Found]
"""Reads the database; called in a worker thread, never twice at once for one listener."""


def while_signed(look: Look, identify: Callable[[], object], *, clock: Callable[[], float] = time.monotonic) -> Look:
    """`look`, for as long as `identify` raises no Unauthorized; it is asked once every RECHECK_SECONDS."""
    checked_at = clock()

    def checked_look() -> Found:
        nonlocal checked_at
        if clock() - checked_at >= RECHECK_SECONDS:
            identify()
            checked_at = clock()
        return look()

    return checked_look


@dataclass(kw_only=True, eq=False, slots=True)
class _Listener:
    look: Look
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    messages: list[bytes] = field(default_factory=list[bytes])
    ended: bool = False

    def take(self) -> list[bytes]:
        taken, self.messages = self.messages, []
        self.ready.clear()
        return taken

    def give(self, found: Found) -> None:
        self.messages += found.messages
        self.ended = self.ended or found.is_last
        if self.messages or self.ended:
            self.ready.set()


class Feed:
    def __init__(self, *, look_seconds: float, heartbeat_seconds: float) -> None:
        self._look_seconds = look_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._listeners: set[_Listener] = set()
        self._somebody = asyncio.Event()
        self._closed = False

    def num_listeners(self) -> int:
        return len(self._listeners)

    async def stream(self, first: Found, look: Look) -> AsyncIterator[bytes]:
        """`first`, then what `look` finds, with comments in between, until it is the last."""
        listener = _Listener(look=look, ended=self._closed)
        listener.give(first)
        self._listeners.add(listener)
        self._somebody.set()
        ends_at = time.monotonic() + MAX_STREAM_SECONDS
        try:
            while time.monotonic() < ends_at:
                try:
                    await asyncio.wait_for(listener.ready.wait(), self._heartbeat_seconds)
                except TimeoutError:
                    yield COMMENT
                for message in listener.take():
                    yield message
                if listener.ended and not listener.messages:
                    return
        finally:
            self._listeners.discard(listener)
            if not self._listeners:
                self._somebody.clear()

    async def run(self) -> None:
        """Look for everybody, at most once every `look_seconds`, and only while somebody listens."""
        while not self._closed:
            await self._somebody.wait()
            await asyncio.sleep(self._look_seconds)
            waiting = [one for one in self._listeners if not one.messages and not one.ended]
            for listener, found in await run_in_threadpool(_look_for, waiting):
                listener.give(found)

    def close(self) -> None:
        """End every stream after what it holds already; call it in the loop's thread."""
        self._closed = True
        for listener in self._listeners:
            listener.ended = True
            listener.ready.set()


def _look_for(listeners: list[_Listener]) -> list[tuple[_Listener, Found]]:
    return [(listener, _safely(listener.look)) for listener in listeners]


def _safely(look: Look) -> Found:
    """One stream's trouble is not the others'. While the database is away, streams are merely silent."""
    try:
        return look()
    except LorryError as error:
        log.warning("stream code=%s", error.code)
        return Found(is_last=error.status < 500)
    except Exception:  # anything else ends this stream alone; its client will come back
        log.exception("crash in a stream")
        return Found(is_last=True)
