"""Turns at the queue: one at a time, by ring or by the worker's own look, whatever goes wrong in one."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from catalog.errors import Unavailable
from worker.entrypoints.celery_polling import Turns

pytestmark = pytest.mark.timeout(60)
NEVER = 3600.0
SOON = 0.01


AWAY = Unavailable("The database is away.", code="database_unavailable", remedy="")


class Work:
    """Of a turn: counted, and held until it may go on."""

    def __init__(self, *, raises: Exception | None = None) -> None:
        self.may_go_on, self.begun = threading.Event(), threading.Semaphore(0)
        self.num_at_once, self.most_at_once = 0, 0
        self._raises, self._lock = raises, threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.num_at_once += 1
            self.most_at_once = max(self.most_at_once, self.num_at_once)
        self.begun.release()
        self.may_go_on.wait()
        with self._lock:
            self.num_at_once -= 1
        if self._raises is not None:
            raise self._raises


def on_a_thread(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


@pytest.mark.parametrize("error", [None, AWAY, ValueError("whatever it is")], ids=["well", "away", "unforeseen"])
def test_a_look_comes_again_and_again_without_a_ring_whatever_becomes_of_it(error: Exception | None) -> None:
    work = Work(raises=error)
    work.may_go_on.set()
    turns = Turns(work, seconds=SOON)

    turns.begin()

    for _ in range(3):
        work.begun.acquire()
    turns.end()


def test_a_ring_amid_a_look_waits_for_its_end_and_is_answered() -> None:
    work = Work()
    turns = Turns(work, seconds=SOON)
    turns.begin()
    work.begun.acquire()

    rung = on_a_thread(turns.take)
    turns_end = on_a_thread(turns.end)

    assert work.num_at_once == 1
    work.may_go_on.set()
    rung.join()
    turns_end.join()
    work.begun.acquire()
    assert work.most_at_once == 1


def test_no_look_is_taken_amid_a_turn_that_was_rung_for() -> None:
    work = Work()
    turns = Turns(work, seconds=SOON)
    rung = on_a_thread(turns.take)
    work.begun.acquire()
    turns.begin()

    assert not work.begun.acquire(timeout=20 * SOON)

    work.may_go_on.set()
    work.begun.acquire()
    rung.join()
    turns.end()
    assert work.most_at_once == 1


def test_the_end_waits_for_the_turn_that_is_being_taken() -> None:
    work = Work()
    turns = Turns(work, seconds=SOON)
    turns.begin()
    work.begun.acquire()

    ending = on_a_thread(turns.end)

    ending.join(10 * SOON)
    assert ending.is_alive()
    work.may_go_on.set()
    ending.join()
    assert work.num_at_once == 0


def test_what_was_never_begun_ends() -> None:
    Turns(Work(), seconds=NEVER).end()
