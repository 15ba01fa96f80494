"""Live streams: one task looks at the database for every topic that somebody listens to, and wakes its listeners.

A topic is a job, or the queue as a project sees it. What is new about it is read, and put into words, once, however
many listen. A listener that joins catches up by itself, a page at a time, until it is where its topic is; it costs no
thread and no connection while it waits.
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

from api.streaming.sse import COMMENT
from catalog.errors import LorryError

MAX_STREAM_SECONDS = 3600.0
"""A stream ends after this long; the client comes back with its key and its Last-Event-ID."""
RECHECK_SECONDS = 30.0
"""A key that is revoked, or a browser that signed out, is looked for this often while a stream is open."""
MAX_PENDING_BYTES = 2**20
"""Of messages that a listener has not taken: it reads too slowly, and its stream ends. It can come back."""
MAX_SHARE = 0.5
"""Of the time, that looks may take: where they take long, they come more rarely."""
MAX_RECHECKED = 100
"""Keys in one round."""
BATCH = 10
PAUSE_SECONDS = 0.002
"""After each batch of BATCH listeners, delivery pauses for PAUSE_SECONDS: other requests run meanwhile."""
CATCHING_UP = 8
"""Listeners that read the database for themselves at one time."""
log = logging.getLogger("lorry.api")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What one look brought, in wire form, and where the looker is now."""

    seq: int = 0
    """Number of the last event that was seen."""
    parts: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])
    """Messages by number, in order."""
    view: object = None
    """How the thing itself looks, to compare; None: as before."""
    view_message: bytes = b""
    has_more: bool = False
    """The next look goes on at once."""
    is_last: bool = False
    mark: object = None
    """The topic's new one, where a source looked."""

    def after(self, seq: int, view: object) -> bytes:
        """The messages for one who has seen so much already."""
        told = [message for number, message in self.parts if number > seq]
        if self.view_message and (view is None or view != self.view):
            told.append(self.view_message)
        return b"".join(told)


Look = Callable[[], Found]
"""One listener's own: reads the database; called in a worker thread, never twice at once."""


@dataclass(kw_only=True, eq=False, slots=True)
class Topic:
    """What some listen to, and how far it was told."""

    seq: int
    view: object
    mark: object = None
    """Its source's own, to know by whether anything is new. None: it is to read and tell how the thing looks."""
    is_doubted: bool = False
    """A listener joined who was told something else than the topic: the next look tells it again."""
    listeners: set[Subscription] = field(default_factory=set["Subscription"])


class Source(Protocol):
    """Reads what is new of topics of one sort."""

    def look(self, topics: Mapping[Hashable, Topic]) -> dict[Hashable, Found]:
        """By key, of those of which anything is new. Called in a worker thread."""
        ...


@dataclass(kw_only=True, eq=False, slots=True)
class Subscription:
    source: Source
    key: Hashable
    look: Look
    signed: Hashable
    """Who it is, as far as it matters whether they still are."""
    seq: int = 0
    view: object = None
    """As it was told by its own looks; None once it goes with its topic."""
    pending: list[bytes] = field(default_factory=list[bytes])
    num_pending_bytes: int = 0
    ended: bool = False
    is_behind: bool = False
    """Its last page was full."""
    last_sent_at: float = 0.0
    ends_at: float = 0.0
    _waiter: asyncio.Future[None] | None = None

    def give(self, messages: bytes) -> None:
        if self.ended or not messages:
            return
        self.pending.append(messages)
        self.num_pending_bytes += len(messages)
        if self.num_pending_bytes > MAX_PENDING_BYTES:
            log.warning("stream code=too_slow")
            self.pending.clear()  # it hears all of that again when it comes back
            self.end()
        self._wake()

    def end(self) -> None:
        """After what it holds."""
        self.ended = True
        self._wake()

    async def take(self) -> bytes:
        """What there is, once there is anything; nothing at the end."""
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
    """Whose streams these are. Many may be opened with one key, which is looked at for all of them at once."""

    identify: Callable[[], object]
    checked_at: float
    listeners: set[Subscription] = field(default_factory=set[Subscription])


class Feed:
    def __init__(self, *, stream_poll_seconds: float, heartbeat_seconds: float) -> None:
        self._look_seconds = stream_poll_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._topics: dict[Source, dict[Hashable, Topic]] = {}
        self._signed: dict[Hashable, _Signed] = {}
        self._listeners: set[Subscription] = set()
        self._somebody = asyncio.Event()
        self._catching_up = anyio.CapacityLimiter(CATCHING_UP)
        self._closed = False

    def num_listeners(self) -> int:
        return len(self._listeners)

    def enter(self, listener: Subscription, first: Found, identify: Callable[[], object]) -> None:
        """It is counted, and has what its first look brought. `identify` raises Unauthorized once it may not listen."""
        now = time.monotonic()
        listener.last_sent_at, listener.ends_at = now, now + MAX_STREAM_SECONDS
        self._listeners.add(listener)
        signed = self._signed.setdefault(listener.signed, _Signed(identify=identify, checked_at=now))
        signed.listeners.add(listener)
        self._note(listener, first)
        if self._closed:
            listener.end()
        self._somebody.set()

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
            self._somebody.clear()

    async def catch_up(self, listener: Subscription) -> bool:
        """One look of its own, unless it goes with its topic now, or has ended: then True."""
        if listener.ended or self._join(listener):
            return True
        found = await anyio.to_thread.run_sync(_safely, listener.look, limiter=self._catching_up)
        if found is None:
            await asyncio.sleep(self._look_seconds)
        else:
            self._note(listener, found)
        return False

    async def run(self) -> None:
        """Look at what is listened to, at most once every `stream_poll_seconds`, and only while somebody listens."""
        async with asyncio.TaskGroup() as tasks:  # the end of one is the end of both
            beats = tasks.create_task(self._beat())
            while not self._closed:
                await self._somebody.wait()
                began = time.monotonic()
                await self._recheck()
                for source in list(self._topics):
                    await self._look(source)
                took = time.monotonic() - began
                await asyncio.sleep(max(self._look_seconds, took * (1 - MAX_SHARE) / MAX_SHARE))
            beats.cancel()

    def close(self) -> None:
        """End every stream after what it holds already; call it in the loop's thread."""
        self._closed = True
        for listener in self._listeners:
            listener.end()

    def _note(self, listener: Subscription, found: Found) -> None:
        """What its own look brought."""
        listener.seq, listener.is_behind = found.seq, found.has_more
        if found.view is not None:
            listener.view = found.view
        listener.give(b"".join([*(message for _, message in found.parts), found.view_message]))
        if found.is_last:
            listener.end()

    def _join(self, listener: Subscription) -> bool:
        """Go with the topic, where the listener has seen all that the topic has told."""
        if listener.is_behind:
            return False
        topics = self._topics.setdefault(listener.source, {})
        topic = topics.get(listener.key)
        if topic is None:
            topic = topics[listener.key] = Topic(seq=listener.seq, view=listener.view)
        if listener.seq < topic.seq:
            return False
        topic.is_doubted = topic.is_doubted or listener.view != topic.view
        topic.listeners.add(listener)
        return True

    async def _look(self, source: Source) -> None:
        topics = self._topics[source]
        for topic in topics.values():
            if topic.is_doubted:
                topic.mark, topic.is_doubted = None, False
        looked_at = dict(topics)
        if looked_at:
            found = await run_in_threadpool(_look_at, source, looked_at)
            for key, news in found.items():
                if topics.get(key) is looked_at[key]:  # else everybody left, and one who came meanwhile is elsewhere
                    await _deliver(looked_at[key], news)

    async def _recheck(self) -> None:
        now = time.monotonic()
        due = [signed for signed in self._signed.values() if now - signed.checked_at >= RECHECK_SECONDS]
        due = sorted(due, key=lambda signed: signed.checked_at)[:MAX_RECHECKED]
        for signed in due:
            signed.checked_at = now
        for signed in await run_in_threadpool(_refused, due) if due else ():
            for listener in signed.listeners:
                listener.end()

    async def _beat(self) -> None:
        """Comments for those who heard nothing for long; and the end of their hour."""
        while True:
            await asyncio.sleep(self._heartbeat_seconds / 4)
            now = time.monotonic()
            for listener in list(self._listeners):
                if now >= listener.ends_at:
                    listener.end()
                elif now - listener.last_sent_at >= self._heartbeat_seconds and not listener.pending:
                    listener.give(COMMENT)


async def _deliver(topic: Topic, news: Found) -> None:
    """In batches, with a pause after each, so that other requests run."""
    seq, view = topic.seq, topic.view
    topic.seq, topic.mark = news.seq, news.mark  # first: who joins between two batches has to catch up with the news
    if news.view is not None:
        topic.view = news.view
    usual = news.after(seq, view)
    waiting = list(topic.listeners)
    try:
        while waiting:
            listener = waiting.pop()
            if listener.seq == seq and listener.view is None:
                listener.give(usual)
            else:  # it joined since the last look, and may be further than that was
                listener.give(news.after(listener.seq, view if listener.view is None else listener.view))
            listener.seq, listener.view = max(listener.seq, news.seq), None
            if news.is_last:
                listener.end()
            if len(waiting) % BATCH == 0:
                await asyncio.sleep(PAUSE_SECONDS if waiting else 0)
    finally:
        for listener in waiting:  # after a crash: each comes back and asks for what it has missed
            listener.end()


def _look_at(source: Source, topics: Mapping[Hashable, Topic]) -> dict[Hashable, Found]:
    """One topic's trouble is not the others'. While the database is away, streams are merely silent."""
    try:
        return source.look(topics)
    except LorryError as error:
        log.warning("stream code=%s", error.code)
        if error.status >= 500:
            return {}
    except Exception:  # anything else ends this stream alone; its client will come back
        log.exception("crash in a stream")
    if len(topics) == 1:
        return {key: Found(seq=topic.seq, is_last=True) for key, topic in topics.items()}
    return {key: news for one in topics for key, news in _look_at(source, {one: topics[one]}).items()}


def _safely(look: Look) -> Found | None:
    """As above, for one listener's own look; None while the database is away."""
    try:
        return look()
    except LorryError as error:
        log.warning("stream code=%s", error.code)
        return Found(is_last=True) if error.status < 500 else None
    except Exception:  # as above
        log.exception("crash in a stream")
        return Found(is_last=True)


def _refused(signed: list[_Signed]) -> list[_Signed]:
    return [one for one in signed if not _is_still(one)]


def _is_still(signed: _Signed) -> bool:
    try:
        signed.identify()
    except LorryError as error:
        return error.status >= 500
    except Exception:  # nobody listens whose key can't be looked at
        log.exception("crash in a stream")
        return False
    return True
