"""SQLite's write lock is shared fairly: between the threads of a process, and between processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Barrier

import pytest
from sqlalchemy import text

from catalog.db.database import Database
from catalog.db.write_queue import SUFFIX, FairLock
from catalog.errors import Unavailable
from catalog.tables.fleet import DatabaseHeartbeat
from tests.catalog.flooding import ADD, COUNTER

ROOT = Path(__file__).parents[3]
READ = text(f"select seen_at from pulse where id = {COUNTER}")
ROUNDS = 10
MOST_OVERTAKING = 4
"""The median limit: the open transaction, the next one, and those that begin before the process starts to wait."""


@pytest.fixture
def shared_db(tmp_path: Path, migrated_database: Path) -> Iterator[Database]:
    (tmp_path / "lorry.db").write_bytes(migrated_database.read_bytes())
    database = Database(f"sqlite:///{tmp_path / 'lorry.db'}")
    with database.write() as session:
        session.add(DatabaseHeartbeat(id=COUNTER, seen_at=0))
    yield database
    database.close()


@contextmanager
def flooded(db: Database) -> Iterator[None]:
    """Run another process that writes to the database without pause, and wait for its first write."""
    argv = [sys.executable, "-m", "tests.catalog.flooding", db.url]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, cwd=ROOT) as flooder:
        try:
            while count(db) == 0:
                assert flooder.poll() is None, "the flooding process has ended"
            yield
        finally:
            assert flooder.stdin is not None
            flooder.stdin.close()
            flooder.wait(60)


def count(db: Database) -> float:
    with db.read() as session:
        return session.execute(READ).scalar_one()


def test_process_waits_for_few_transactions_of_a_busy_process(shared_db: Database) -> None:
    overtaking: list[float] = []

    with flooded(shared_db):
        for _ in range(ROUNDS):
            before = count(shared_db)
            with shared_db.write() as session:
                overtaking.append(session.execute(READ).scalar_one() - before)
                session.execute(ADD)

    assert median(overtaking) <= MOST_OVERTAKING  # this process may be paused between the count and the write


def test_killed_waiting_process_blocks_no_other(shared_db: Database) -> None:
    argv = [sys.executable, "-m", "tests.catalog.flooding", shared_db.url]
    with shared_db.write(), subprocess.Popen(argv, stdin=subprocess.PIPE, cwd=ROOT) as waiting:
        while not is_occupied(shared_db):
            assert waiting.poll() is None, "the waiting process has ended"
        with pytest.raises(Unavailable), Database(shared_db.url).write_briefly():
            pass
        waiting.kill()

    with shared_db.write_briefly() as session:
        session.execute(ADD)

    assert count(shared_db) == 1


def is_occupied(db: Database) -> bool:
    """Return whether a process is waiting as the next writer."""
    path = db.url.removeprefix("sqlite:///") + SUFFIX
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_turnstile_file_is_accessible_to_its_owner_only(shared_db: Database) -> None:
    path = Path(shared_db.url.removeprefix("sqlite:///") + SUFFIX)

    assert path.stat().st_mode & 0o777 == 0o600


def test_fair_lock_is_acquired_in_request_order() -> None:
    lock, order, started = FairLock(), list[int](), Barrier(2)
    assert lock.acquire(0)

    def wait(number: int) -> None:
        started.wait(60)
        assert lock.acquire(60)
        order.append(number)
        lock.release()

    with ThreadPoolExecutor(8) as pool:
        for number in range(8):
            pool.submit(wait, number)
            started.wait(60)
            while lock.num_waiting <= number:
                pass
        lock.release()

    assert order == list(range(8))
    assert lock.acquire(0), "the lock must be free again"


def test_thread_that_stops_waiting_is_passed_over() -> None:
    lock = FairLock()
    assert lock.acquire(0)

    assert not lock.acquire(0.01)
    lock.release()

    assert lock.acquire(0)
