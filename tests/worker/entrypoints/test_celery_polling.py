"""Polls of the queue, by notification or by timer: one at a time, whatever error one meets."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from catalog.errors import Unavailable
from worker.entrypoints.celery_app import QueuePoller

pytestmark = pytest.mark.timeout(60)
NEVER = 3600.0
SOON = 0.01


AWAY = Unavailable("database_unavailable")


class Work:
    """The work of a poll. It counts concurrent calls, and blocks until it may continue."""

    def __init__(self, *, raises: Exception | None = None) -> None:
        self.may_continue, self.begun = threading.Event(), threading.Semaphore(0)
        self.num_at_once, self.most_at_once = 0, 0
        self._raises, self._lock = raises, threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.num_at_once += 1
            self.most_at_once = max(self.most_at_once, self.num_at_once)
        self.begun.release()
        self.may_continue.wait()
        with self._lock:
            self.num_at_once -= 1
        if self._raises is not None:
            raise self._raises


def on_a_thread(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "error", [None, AWAY, ValueError("an unexpected error")], ids=["success", "outage", "unexpected error"]
)
def test_polls_repeat_without_notifications_whatever_their_outcome(error: Exception | None) -> None:
    work = Work(raises=error)
    work.may_continue.set()
    poller = QueuePoller(work, seconds=SOON)

    poller.begin()

    for _ in range(3):
        work.begun.acquire()
    poller.end()


def test_a_notification_during_a_poll_waits_for_its_end_and_is_handled() -> None:
    work = Work()
    poller = QueuePoller(work, seconds=SOON)
    poller.begin()
    work.begun.acquire()

    notified = on_a_thread(poller.work)
    turns_end = on_a_thread(poller.end)

    assert work.num_at_once == 1
    work.may_continue.set()
    notified.join()
    turns_end.join()
    work.begun.acquire()
    assert work.most_at_once == 1


def test_no_timed_poll_runs_during_a_notified_poll() -> None:
    work = Work()
    poller = QueuePoller(work, seconds=SOON)
    notified = on_a_thread(poller.work)
    work.begun.acquire()
    poller.begin()

    assert not work.begun.acquire(timeout=20 * SOON)

    work.may_continue.set()
    work.begun.acquire()
    notified.join()
    poller.end()
    assert work.most_at_once == 1


def test_end_waits_for_the_running_poll() -> None:
    work = Work()
    poller = QueuePoller(work, seconds=SOON)
    poller.begin()
    work.begun.acquire()

    ending = on_a_thread(poller.end)

    ending.join(10 * SOON)
    assert ending.is_alive()
    work.may_continue.set()
    ending.join()
    assert work.num_at_once == 0


def test_end_returns_if_polling_never_began() -> None:
    QueuePoller(Work(), seconds=NEVER).end()
