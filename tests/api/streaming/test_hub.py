"""The live-stream hub alone: joining at any time, slow listeners, and revoked keys."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import pytest

from api.streaming import hub
from api.streaming.hub import Feed, Found, Subscription, Topic
from catalog.error_texts import ErrorText
from catalog.errors import Unauthorized, Unavailable


@dataclass(eq=False)
class Log:
    """A source whose topics are logs of numbered messages."""

    written: dict[Hashable, list[int]] = field(default_factory=dict[Hashable, list[int]])
    polls: list[dict[Hashable, int]] = field(default_factory=list[dict[Hashable, int]])

    def write(self, key: Hashable, count: int = 1) -> None:
        log = self.written.setdefault(key, [])
        log += range(len(log) + 1, len(log) + 1 + count)

    def poll(self, topics: Mapping[Hashable, Topic]) -> dict[Hashable, Found]:
        self.polls.append({key: topic.seq for key, topic in topics.items()})
        return {key: self.found(key, topic.seq) for key, topic in topics.items() if len(self.written[key]) > topic.seq}

    def found(self, key: Hashable, seq: int, limit: int = 10**9) -> Found:
        new = self.written[key][seq : seq + limit]
        parts = [(number, b"%d " % number) for number in new]
        has_more = seq + len(new) < len(self.written[key])
        return Found(seq=seq + len(new), parts=parts, has_more=has_more, view=None if has_more else "same")

    def listener(self, key: Hashable, seq: int = 0, *, page: int = 3, identity: Hashable = "me") -> Subscription:
        def poll() -> Found:
            return self.found(key, listener.seq, page)

        listener = Subscription(source=self, key=key, poll=poll, signed=identity)
        listener.seq = seq
        return listener


def welcome() -> None:
    return None


async def caught_up(feed: Feed, listener: Subscription, identify: Callable[[], object] = welcome) -> None:
    feed.enter(listener, listener.poll(), identify)
    while not await feed.catch_up(listener):
        pass


def new_feed() -> Feed:
    return Feed(stream_poll_seconds=0.001, heartbeat_seconds=60)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def held(listener: Subscription) -> list[int]:
    return [int(number) for number in b"".join(listener.pending).split()]


def test_listeners_that_join_at_any_time_receive_everything_once() -> None:
    async def scenario() -> None:
        feed, log = new_feed(), Log()
        log.write("job", 10)
        listeners: list[Subscription] = []
        running = asyncio.create_task(feed.run())
        for seq in (0, 4, 10, 2):
            listener = log.listener("job", seq)
            await caught_up(feed, listener)
            listeners.append(listener)
            log.write("job", 2)
            await asyncio.sleep(0.003)
        log.write("job")
        await until(lambda: all(held(listener)[-1:] == [19] for listener in listeners))
        feed.close()
        running.cancel()

        for listener, seq in zip(listeners, (0, 4, 10, 2), strict=True):
            assert held(listener) == list(range(seq + 1, 20))
        assert all(len(poll) == 1 for poll in log.polls)

    asyncio.run(scenario())


def test_listener_ahead_gets_no_repeats_and_listener_behind_catches_up() -> None:
    async def scenario() -> None:
        feed, log = new_feed(), Log()
        log.write("job", 2)
        first = log.listener("job")
        await caught_up(feed, first)
        log.write("job", 2)  # the topic has not been polled since
        ahead = log.listener("job")
        await caught_up(feed, ahead)
        behind = log.listener("job", page=1)
        feed.enter(behind, behind.poll(), welcome)
        assert not await feed.catch_up(behind)

        running = asyncio.create_task(feed.run())
        log.write("job")
        await until(lambda: held(first)[-1:] == [5])
        while not await feed.catch_up(behind):
            pass
        running.cancel()

        assert [held(listener) for listener in (first, ahead, behind)] == [[1, 2, 3, 4, 5]] * 3

    asyncio.run(scenario())


def test_restarted_topic_ignores_a_poll_result_of_its_predecessor() -> None:
    class Slow(Log):
        def poll(self, topics: Mapping[Hashable, Topic]) -> dict[Hashable, Found]:
            found = super().poll(topics)
            looked.set()
            assert resume.wait(20)
            return found

    looked, resume = threading.Event(), threading.Event()

    async def scenario() -> None:
        feed, log = new_feed(), Slow()
        log.write("job", 6)
        early, late = log.listener("job", page=5), log.listener("job", page=2)
        feed.enter(early, early.poll(), welcome)
        feed.enter(late, late.poll(), welcome)
        early.is_behind = late.is_behind = False  # as if nothing had been written since
        assert await feed.catch_up(early)
        running = asyncio.create_task(feed.run())
        await until(looked.is_set)
        feed.leave(early)
        assert await feed.catch_up(late)
        resume.set()
        await until(lambda: held(late)[-1:] == [6])
        running.cancel()

        assert held(late) == [1, 2, 3, 4, 5, 6]

    asyncio.run(scenario())


def test_message_wakes_only_the_listeners_of_its_topic() -> None:
    async def scenario() -> None:
        feed, log = new_feed(), Log()
        for key in ("one", "other"):
            log.write(key)
        one, other = log.listener("one"), log.listener("other")
        for listener in (one, other):
            await caught_up(feed, listener)
            await listener.take()
        running = asyncio.create_task(feed.run())
        log.write("one")
        taken = await one.take()
        running.cancel()

        assert (taken, other.pending) == (b"2 ", [])

    asyncio.run(scenario())


def test_slow_listener_is_ended_and_its_buffer_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MAX_PENDING_BYTES", 100)

    async def scenario() -> None:
        feed, log = new_feed(), Log()
        log.write("job")
        slow, quick = log.listener("job"), log.listener("job")
        for listener in (slow, quick):
            await caught_up(feed, listener)
        running = asyncio.create_task(feed.run())
        received: list[int] = []
        for _ in range(40):
            log.write("job")
            while log.written["job"][-1] not in received:
                received += [int(number) for number in (await quick.take()).split()]
        running.cancel()

        assert (slow.ended, slow.pending, quick.ended) == (True, [], False)
        assert received == list(range(1, 42))
        feed.leave(slow)
        feed.leave(quick)
        assert feed.num_listeners() == 0

    asyncio.run(scenario())


def test_key_is_checked_once_for_all_its_streams_and_ends_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "RECHECK_SECONDS", 0.0)

    async def scenario() -> None:
        feed, log = new_feed(), Log()
        log.write("job")
        identified: list[str] = []

        def identify(identity: str) -> Callable[[], object]:
            def ask() -> None:
                identified.append(identity)
                if identity == "gone" and len(identified) > 6:
                    raise Unauthorized(
                        ErrorText(code="invalid_api_key", message="It was revoked.", remedy="Use another.")
                    )
                if identity == "away":
                    raise Unavailable("database_unavailable")

            return ask

        listeners = [log.listener("job", identity=identity) for identity in ("gone", "gone", "away", "stays")]
        for listener in listeners:
            await caught_up(feed, listener, identify(str(listener.signed)))
        running = asyncio.create_task(feed.run())
        await until(lambda: listeners[0].ended)
        running.cancel()

        assert [listener.ended for listener in listeners] == [True, True, False, False]
        assert identified[:3] == ["gone", "away", "stays"]

    asyncio.run(scenario())


def test_idle_listener_receives_comments() -> None:
    async def scenario() -> None:
        feed, log = Feed(stream_poll_seconds=0.001, heartbeat_seconds=0.01), Log()
        log.write("job")
        listener = log.listener("job", 1)
        await caught_up(feed, listener)
        running = asyncio.create_task(feed.run())
        comments = [await listener.take() for _ in range(3)]
        running.cancel()

        assert comments == [b": still here\n\n"] * 3

    asyncio.run(scenario())


def test_other_tasks_run_while_a_thousand_listeners_are_served() -> None:
    async def scenario() -> None:
        feed, log = new_feed(), Log()
        log.write("topic")
        listeners = [log.listener("topic") for _ in range(1000)]
        for listener in listeners:
            await caught_up(feed, listener)
            await listener.take()
        running = asyncio.create_task(feed.run())
        log.write("topic")
        num_given: set[int] = set()
        while not num_given or max(num_given) < len(listeners):
            await asyncio.sleep(0)
            num_given.add(sum(bool(listener.pending) for listener in listeners))
        running.cancel()

        assert len(num_given) > len(listeners) / hub.BATCH

    asyncio.run(scenario())


def test_listener_that_joins_between_batches_receives_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "BATCH", 1)

    async def scenario() -> None:
        feed, log = new_feed(), Log()
        log.write("topic")
        first, second, late = (log.listener("topic") for _ in range(3))
        for listener in (first, second):
            await caught_up(feed, listener)
            await listener.take()
        began = Found(seq=1)
        running = asyncio.create_task(feed.run())
        log.write("topic")
        while bool(first.pending) == bool(second.pending):
            await asyncio.sleep(0)
        late.seq = 1
        feed.enter(late, began, welcome)  # it polled before the new message
        while not await feed.catch_up(late):
            pass
        log.write("topic")
        received = b""
        while b"3" not in received:
            received += await late.take()
        running.cancel()

        assert received == b"2 3 "

    asyncio.run(scenario())
