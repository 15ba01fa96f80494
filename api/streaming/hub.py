"""Polls the database once for each topic of live streams that has listeners, and wakes these listeners.

A topic is a job, or the queue as a project sees it. Its changes are read and serialized once for all its listeners. A
new listener first catches up alone, one page at a time, until it has seen everything that its topic has sent. A waiting
listener uses no thread and no database connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.requests.disconnects import disconnected
from api.streaming.sse import COMMENT, HEADERS
from catalog.errors import LorryError

MAX_STREAM_SECONDS = 3600.0
"""Maximum duration of a stream. The client then reconnects with its key and its Last-Event-ID."""
RECHECK_SECONDS = 30.0
"""Interval at which the key or session of an open stream is checked for revocation or sign-out."""
MAX_PENDING_BYTES = 2**20
"""Maximum size of the messages that a listener has not taken. If a client reads too slowly, its stream ends, and it may
reconnect."""
MAX_SHARE = 0.5
"""Maximum fraction of the time spent polling: slow polls become rarer."""
MAX_RECHECKED = 100
"""Maximum number of keys checked at a time."""
BATCH = 10
PAUSE_SECONDS = 0.002
"""Delivery pauses for PAUSE_SECONDS after each batch of BATCH listeners, so that other requests run."""
CATCHING_UP = 8
"""Maximum number of listeners that read the database at the same time to catch up."""
log = logging.getLogger("lorry.api")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The result of one poll as serialized messages, and the position of the reader after it."""

    seq: int = 0
    """Number of the last event read."""
    parts: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])
    """Messages with their numbers, in order."""
    view: object = None
    """A comparable view of the object itself; None if unchanged."""
    view_message: bytes = b""
    has_more: bool = False
    """The next poll follows immediately."""
    is_last: bool = False
    cursor: object = None
    """The new mark of the topic, if a source polled it."""

    def after(self, seq: int, view: object) -> bytes:
        """Return the messages for a listener that has seen `seq` and `view`."""
        messages = [message for number, message in self.parts if number > seq]
        if self.view_message and (view is None or view != self.view):
            messages.append(self.view_message)
        return b"".join(messages)


Poll = Callable[[], Found]
"""A listener's own poll. It reads the database; it is called in a worker thread, never concurrently."""


@dataclass(kw_only=True, eq=False, slots=True)
class Topic:
    """An object with listeners, and the position up to which its changes have been sent."""

    seq: int
    view: object
    cursor: object = None
    """Its source's position, used to detect changes. None: the source must read and send the object itself."""
    must_resend: bool = False
    """A listener joined that was sent a different view than the topic: the next poll sends the view again."""
    listeners: set[Subscription] = field(default_factory=set["Subscription"])


class Source(Protocol):
    """Reads the changes of topics of one kind."""

    def poll(self, topics: Mapping[Hashable, Topic]) -> dict[Hashable, Found]:
        """Return the changes by key, for topics that have any. Called in a worker thread."""
        ...


@dataclass(kw_only=True, eq=False, slots=True)
class Subscription:
    source: Source
    key: Hashable
    poll: Poll
    signed: Hashable
    """Identifies the key or session of the listener. Listeners with equal values are checked together."""
    seq: int = 0
    view: object = None
    """The view that its own polls sent; None once it follows its topic."""
    pending: list[bytes] = field(default_factory=list[bytes])
    num_pending_bytes: int = 0
    ended: bool = False
    is_behind: bool = False
    """Its last page was full, so there may be more."""
    last_sent_at: float = 0.0
    ends_at: float = 0.0
    _waiter: asyncio.Future[None] | None = None

    def enqueue(self, messages: bytes) -> None:
        if self.ended or not messages:
            return
        self.pending.append(messages)
        self.num_pending_bytes += len(messages)
        if self.num_pending_bytes > MAX_PENDING_BYTES:
            log.warning("stream code=too_slow")
            self.pending.clear()  # the client gets these messages again when it reconnects
            self.end()
        self._wake()

    def end(self) -> None:
        """End the stream once the pending messages are sent."""
        self.ended = True
        self._wake()

    async def take(self) -> bytes:
        """Wait for messages and return them; empty at the end of the stream."""
        if not self.pending and not self.ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        taken = self.pending[0] if len(self.pending) == 1 else b"".join(self.pending)
        self.pending.clear()
        self.num_pending_bytes = 0
        self.last_sent_at = time.monotonic()
        return taken

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(kw_only=True, eq=False, slots=True)
class _Signed:
    """A key or session and its streams, which are checked together."""

    identify: Callable[[], object]
    checked_at: float
    listeners: set[Subscription] = field(default_factory=set[Subscription])


class Feed:
    def __init__(self, *, stream_poll_seconds: float, heartbeat_seconds: float) -> None:
        self._poll_seconds = stream_poll_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._topics: dict[Source, dict[Hashable, Topic]] = {}
        self._signed: dict[Hashable, _Signed] = {}
        self._listeners: set[Subscription] = set()
        self._has_listeners = asyncio.Event()
        self._catching_up = anyio.CapacityLimiter(CATCHING_UP)
        self._closed = False

    def num_listeners(self) -> int:
        return len(self._listeners)

    def enter(self, listener: Subscription, first: Found, identify: Callable[[], object]) -> None:
        """Register a listener with its first poll's result. `identify` raises Unauthorized if access is revoked."""
        now = time.monotonic()
        listener.last_sent_at, listener.ends_at = now, now + MAX_STREAM_SECONDS
        self._listeners.add(listener)
        signed = self._signed.setdefault(listener.signed, _Signed(identify=identify, checked_at=now))
        signed.listeners.add(listener)
        self._apply(listener, first)
        if self._closed:
            listener.end()
        self._has_listeners.set()

    def leave(self, listener: Subscription) -> None:
        self._listeners.discard(listener)
        signed = self._signed.get(listener.signed)
        if signed is not None:
            signed.listeners.discard(listener)
            if not signed.listeners:
                del self._signed[listener.signed]
        topics = self._topics.get(listener.source, {})
        topic = topics.get(listener.key)
        if topic is not None:
            topic.listeners.discard(listener)
            if not topic.listeners:
                del topics[listener.key]
        if not self._listeners:
            self._has_listeners.clear()

    async def catch_up(self, listener: Subscription) -> bool:
        """Poll once for this listener. Return True instead if it follows its topic or has ended."""
        if listener.ended or self._join(listener):
            return True
        found = await anyio.to_thread.run_sync(_poll_safely, listener.poll, limiter=self._catching_up)
        if found is None:
            await asyncio.sleep(self._poll_seconds)
        else:
            self._apply(listener, found)
        return False

    async def run(self) -> None:
        """Poll all topics, at most once every `stream_poll_seconds`, and only while there are listeners."""
        async with asyncio.TaskGroup() as tasks:  # if one of the two tasks ends, both end
            beats = tasks.create_task(self._beat())
            while not self._closed:
                await self._has_listeners.wait()
                began = time.monotonic()
                await self._recheck()
                for source in list(self._topics):
                    await self._poll(source)
                took = time.monotonic() - began
                await asyncio.sleep(max(self._poll_seconds, took * (1 - MAX_SHARE) / MAX_SHARE))
            beats.cancel()

    def close(self) -> None:
        """End every stream after its pending messages. Must be called in the event loop's thread."""
        self._closed = True
        for listener in self._listeners:
            listener.end()

    def _apply(self, listener: Subscription, found: Found) -> None:
        """Apply the result of the listener's own poll."""
        listener.seq, listener.is_behind = found.seq, found.has_more
        if found.view is not None:
            listener.view = found.view
        listener.enqueue(b"".join([*(message for _, message in found.parts), found.view_message]))
        if found.is_last:
            listener.end()

    def _join(self, listener: Subscription) -> bool:
        """Make the listener follow its topic if it has seen everything that the topic has sent."""
        if listener.is_behind:
            return False
        topics = self._topics.setdefault(listener.source, {})
        topic = topics.get(listener.key)
        if topic is None:
            topic = topics[listener.key] = Topic(seq=listener.seq, view=listener.view)
        if listener.seq < topic.seq:
            return False
        topic.must_resend = topic.must_resend or listener.view != topic.view
        topic.listeners.add(listener)
        return True

    async def _poll(self, source: Source) -> None:
        topics = self._topics[source]
        for topic in topics.values():
            if topic.must_resend:
                topic.cursor, topic.must_resend = None, False
        polled = dict(topics)
        if polled:
            found = await run_in_threadpool(_poll_topics, source, polled)
            for key, update in found.items():
                if topics.get(key) is polled[key]:  # else all listeners left, and a new topic may exist for the key
                    await _deliver(polled[key], update)

    async def _recheck(self) -> None:
        now = time.monotonic()
        due = [signed for signed in self._signed.values() if now - signed.checked_at >= RECHECK_SECONDS]
        due = sorted(due, key=lambda signed: signed.checked_at)[:MAX_RECHECKED]
        for signed in due:
            signed.checked_at = now
        for signed in await run_in_threadpool(_revoked, due) if due else ():
            for listener in signed.listeners:
                listener.end()

    async def _beat(self) -> None:
        """Send comments on idle streams, and end streams after MAX_STREAM_SECONDS."""
        while True:
            await asyncio.sleep(self._heartbeat_seconds / 4)
            now = time.monotonic()
            for listener in list(self._listeners):
                if now >= listener.ends_at:
                    listener.end()
                elif now - listener.last_sent_at >= self._heartbeat_seconds and not listener.pending:
                    listener.enqueue(COMMENT)


async def _deliver(topic: Topic, update: Found) -> None:
    """Deliver in batches, with a pause after each, so that other requests run."""
    seq, view = topic.seq, topic.view
    topic.seq, topic.cursor = (
        update.seq,
        update.cursor,
    )  # first, so that a listener that joins between batches must catch up
    if update.view is not None:
        topic.view = update.view
    common = update.after(seq, view)
    waiting = list(topic.listeners)
    try:
        while waiting:
            listener = waiting.pop()
            if listener.seq == seq and listener.view is None:
                listener.enqueue(common)
            else:  # it joined since the last poll, and may have seen more than that poll returned
                listener.enqueue(update.after(listener.seq, view if listener.view is None else listener.view))
            listener.seq, listener.view = max(listener.seq, update.seq), None
            if update.is_last:
                listener.end()
            if len(waiting) % BATCH == 0:
                await asyncio.sleep(PAUSE_SECONDS if waiting else 0)
    finally:
        for listener in waiting:  # after a crash: each client reconnects and requests the events it missed
            listener.end()


def _poll_topics(source: Source, topics: Mapping[Hashable, Topic]) -> dict[Hashable, Found]:
    """Poll all topics; after an error, poll each alone. While the database is unavailable, streams stay silent."""
    try:
        return source.poll(topics)
    except LorryError as error:
        log.warning("stream code=%s", error.code)
        if error.status >= 500:
            return {}
    except Exception:  # any other error ends only this topic's streams; the clients reconnect
        log.exception("crash in a stream")
    if len(topics) == 1:
        return {key: Found(seq=topic.seq, is_last=True) for key, topic in topics.items()}
    return {key: update for one in topics for key, update in _poll_topics(source, {one: topics[one]}).items()}


def _poll_safely(poll: Poll) -> Found | None:
    """Run a listener's own poll with the same error handling; None while the database is unavailable."""
    try:
        return poll()
    except LorryError as error:
        log.warning("stream code=%s", error.code)
        return Found(is_last=True) if error.status < 500 else None
    except Exception:  # as in _poll_topics
        log.exception("crash in a stream")
        return Found(is_last=True)


def _revoked(signed: list[_Signed]) -> list[_Signed]:
    return [one for one in signed if not _is_valid(one)]


def _is_valid(signed: _Signed) -> bool:
    try:
        signed.identify()
    except LorryError as error:
        return error.status >= 500
    except Exception:  # a key that can't be checked must not keep its streams
        log.exception("crash in a stream")
        return False
    return True


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
