"""Transactions on both databases: the clock, outages, and all-or-nothing writes."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psycopg
import pytest
from sqlalchemy import BigInteger, Connection, Float, QueuePool, event, func, literal, select, text, update

from catalog.db import database
from catalog.db.database import (
    BRIEF_MILLISECONDS,
    STUCK_SECONDS,
    Database,
    get_once,
    read_clock,
    serialize,
    serialized_at,
    upsert,
)
from catalog.errors import InvalidRequest, OutOfSpace, Unavailable
from catalog.tables.fleet import DatabaseHeartbeat
from catalog.tables.history import MetricBlock
from catalog.tables.jobs import Job
from catalog.tables.storage import File
from catalog.tables.tenancy import Organization
from catalog.tenancy import projects
from tests.catalog.db.test_lock_order import MAX_CHECKS, wait_for_one_in_line
from tests.catalog.read_costs import statements_of
from tests.catalog.world import World, request

pytestmark = pytest.mark.both_databases
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
ON_POSTGRESQL = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


def wait_in_line(database: Database, waiting: Future[Any]) -> None:
    """Wait until the thread waits for the lock of another transaction. Fails if the thread ends, or takes too long."""
    if database.is_sqlite:
        for look in count():
            if database._write_lock.num_waiting or waiting.done():  # pyright: ignore[reportPrivateUsage]
                break
            assert look < MAX_CHECKS, "the thread neither waited for the write lock nor ended"
            time.sleep(0.01)
    else:
        wait_for_one_in_line(database, or_end_of=waiting)
    assert not waiting.done(), f"the thread did not wait: {waiting.exception()}"


def test_clock_is_the_clock_of_the_database(database_url: str) -> None:
    database = Database(database_url)

    with database.read() as session:
        reported = read_clock(session)

    database.close()
    assert abs(reported - time.time()) < 5


def test_failed_transaction_leaves_no_rows(db: Database) -> None:
    def write_half() -> None:
        with db.write() as session:
            session.add(Organization(id="p", name="p", created_at=0))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()

    with db.read() as session:
        assert session.scalars(select(Organization)).all() == []


def test_sums_are_numbers_of_python_on_both_databases(db: Database) -> None:
    large = 2**53 + 1

    with db.read() as session:
        sums = [
            session.scalar(select(func.sum(literal(number, kind))))
            for number, kind in ((large, BigInteger), (0.25, Float))
        ]

    assert json.dumps(sums) == f"[{large}, 0.25]"


def test_concurrent_writers_lose_no_write(db: Database) -> None:
    with db.write() as session:
        session.add(DatabaseHeartbeat(id=2, seen_at=0))

    def add_one(_: int) -> None:
        with db.write() as session:
            row = session.get_one(DatabaseHeartbeat, 2, with_for_update=True)
            row.seen_at += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_one, range(80)))

    with db.read() as session:
        assert session.get_one(DatabaseHeartbeat, 2).seen_at == 80


def test_transactions_serialized_by_name_run_one_after_another(db: Database) -> None:
    inside: list[str] = []

    def enter(_: int) -> None:
        with db.write() as session:
            serialize(session, "one at a time")
            inside.append("in")
            session.execute(select(Organization))
            inside.append("out")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(24)))

    assert inside == ["in", "out"] * 24


def test_serialized_at_reads_the_clock_after_the_wait(database_url: str) -> None:
    database = Database(database_url)  # with its own clock, not the test clock

    def enter() -> float:
        with database.write() as session:
            return serialized_at(session, "one at a time")

    with ThreadPoolExecutor() as pool:
        with database.write() as session:
            serialize(session, "one at a time")
            waiting = pool.submit(enter)
            wait_in_line(database, waiting)
            last = read_clock(session)
        assert waiting.result(timeout=30) >= last

    database.close()


def test_get_once_locks_a_row_again_only_after_a_savepoint_rollback(world: World) -> None:
    def act() -> None:
        with world.db.write() as session:
            row = get_once(session, File, world.file_id, lock="share")
            with session.begin_nested() as attempt:
                assert get_once(session, File, world.file_id, lock="share") is row
                attempt.rollback()
            assert get_once(session, File, world.file_id, lock="share") is row
            assert get_once(session, File, world.file_id, lock="share") is row
            assert get_once(session, File, "file-none", lock="share") is None

    queries = [text for text, _ in statements_of(world.db, act) if "FROM files" in text]

    assert len(queries) == 3
    assert world.db.is_sqlite or all("FOR SHARE" in text for text in queries)


def test_get_once_queries_an_unlocked_row_once_per_transaction(world: World) -> None:
    def act() -> None:
        with world.db.write() as session:
            for _ in range(3):
                assert get_once(session, File, world.file_id) is not None  # no variable keeps the row alive

    queries = [text for text, _ in statements_of(world.db, act) if "FROM files" in text]

    assert len(queries) == 1
    assert "FOR " not in queries[0]


def test_upsert_replaces_by_primary_key_and_keeps_other_rows(world: World) -> None:
    job = world.submit()
    block = {"job_id": job.id, "kind": "train", "last_step": 9, "num_points": 1, "last_seq": 1, "points": b"some"}

    with world.db.write() as session:
        upsert(session, MetricBlock, [{**block, "first_step": step, "least_loss": 3.0} for step in (1, 2)])
        upsert(session, MetricBlock, [{**block, "first_step": 2, "least_loss": 1.0}])
        upsert(session, MetricBlock, [])

    with world.db.read() as session:
        rows = session.scalars(select(MetricBlock).order_by(MetricBlock.first_step)).all()
        assert [(row.first_step, row.least_loss, row.points) for row in rows] == [(1, 3.0, b"some"), (2, 1.0, b"some")]


def test_unreachable_database_is_unavailable(tmp_path: Path) -> None:
    database = Database("postgresql+psycopg://lorry@127.0.0.1:1/none")

    with pytest.raises(Unavailable) as refusal, database.read() as session:
        read_clock(session)

    database.close()
    assert refusal.value.status == 503
    assert refusal.value.retry_after_seconds > 0


def test_locked_database_is_unavailable_and_unchanged(
    tmp_path: Path, migrated_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lorry.db").write_bytes(migrated_database.read_bytes())
    holder = Database(f"sqlite:///{tmp_path / 'lorry.db'}")
    monkeypatch.setattr("catalog.db.database.BUSY_SECONDS", 0.01)
    database = Database(f"sqlite:///{tmp_path / 'lorry.db'}")

    with holder.write(), pytest.raises(Unavailable):
        projects.ensure(database, "new")

    assert projects.ensure(database, "new").name == "new"
    holder.close()
    database.close()


@ON_SQLITE
def test_sqlite_writers_queue_without_holding_a_connection(db: Database) -> None:
    with ThreadPoolExecutor() as pool:
        with db.write():
            waiting = pool.submit(projects.ensure, db, "new")
            wait_in_line(db, waiting)
            taken = cast(QueuePool, db.engine.pool).checkedout()
            with pytest.raises(Unavailable), db.write_briefly():
                pass
        assert waiting.result(timeout=30).name == "new"

    assert taken == 1


def test_postgresql_jit_is_off(shared_postgres_url: str) -> None:
    database = Database(shared_postgres_url)

    with database.read() as session:
        assert session.scalar(text("show jit")) == "off"

    database.close()


@ON_SQLITE
def test_waits_for_threads_and_for_processes_share_one_deadline(db: Database) -> None:
    reported: list[int] = []

    def note(connection: Connection) -> None:
        left = connection.get_execution_options()["lorry_deadline"] - time.monotonic()
        reported.append(int(left * 1000))

    event.listen(db.engine, "begin", note)

    def enter() -> None:
        with db.write():
            pass

    with ThreadPoolExecutor() as pool:
        with db.write():
            waiting = pool.submit(enter)
            wait_in_line(db, waiting)
            time.sleep(0.5)
        waiting.result(timeout=30)
    with db.write_briefly():
        pass

    at_once, after_the_other, briefly = reported
    assert 0 < at_once <= 30_000
    assert after_the_other <= 29_500, "the second writer had already waited for half a second"
    assert briefly <= BRIEF_MILLISECONDS


def test_long_write_transaction_is_logged_with_its_caller(
    db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write() -> None:
        with db.write() as session:
            session.execute(text("select 1"))

    monkeypatch.setattr("catalog.db.database.LONG_WRITE_SECONDS", 60.0)
    write()
    monkeypatch.setattr("catalog.db.database.LONG_WRITE_SECONDS", 0.0)
    write()

    assert db.num_long_writes == 1
    (record,) = caplog.records
    assert record.getMessage().endswith(f"by={__name__}.write")


@pytest.mark.both_databases
@pytest.mark.parametrize(
    ("computed", "waited", "in_commit", "is_long_on"),
    [(61.0, 61.0, 0.0, {"sqlite", "postgresql"}), (0.0, 61.0, 0.0, {"postgresql"}), (0.0, 0.0, 61.0, set())],
    ids=["computation", "wait or statement of PostgreSQL", "commit"],
)
def test_only_the_work_of_a_transaction_counts_as_long(
    db: Database,
    monkeypatch: pytest.MonkeyPatch,
    computed: float,
    waited: float,
    in_commit: float,
    is_long_on: set[str],
) -> None:
    clock = {"thread": 0.0, "now": 0.0}
    fake = SimpleNamespace(monotonic=lambda: clock["now"], thread_time=lambda: clock["thread"], sleep=time.sleep)
    monkeypatch.setattr(database, "time", fake)
    monkeypatch.setattr(database, "LONG_WRITE_SECONDS", 60.0)
    event.listen(db.engine, "commit", lambda _: clock.update(thread=in_commit, now=waited + in_commit))

    with db.write() as session:
        session.execute(text("select 1"))
        clock.update(thread=computed, now=waited)

    assert clock["now"] == waited + in_commit
    assert db.num_long_writes == (db.engine.dialect.name in is_long_on)


@ON_SQLITE
def test_full_disk_is_reported(db: Database) -> None:
    def fill() -> None:
        with db.write() as session:
            pages = session.scalar(text("pragma page_count"))
            session.execute(text(f"pragma max_page_count={pages}"))
            session.add_all([Organization(id=f"{i:0200d}", name=f"{i:0200d}", created_at=0) for i in range(200)])

    with pytest.raises(OutOfSpace, match="full"):
        fill()

    with db.read() as session:
        assert session.scalars(select(Organization)).all() == []


def test_unstorable_value_is_an_invalid_request(world: World) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        world.send(request(training_file=world.file_id), idempotency_key="half a \ud800 character")

    assert refusal.value.code == "invalid_value"
    assert "unpaired surrogate" in refusal.value.message


def test_number_that_is_too_large_to_store_is_an_invalid_request(world: World) -> None:
    with pytest.raises(InvalidRequest, match="is too large to store") as refusal, world.db.write() as session:
        session.execute(update(Job).values(num_steps=2**63))

    assert refusal.value.code == "invalid_value"


@ON_POSTGRESQL
def test_read_only_database_is_unavailable(db: Database) -> None:
    def write() -> None:
        with db.write() as session:
            session.execute(text("set transaction read only"))
            session.add(Organization(id="p", name="p", created_at=0))

    with pytest.raises(Unavailable):
        write()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_database_without_tables_is_reported_as_not_set_up(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    is_sqlite = kind == "sqlite"
    database = Database(
        f"sqlite:///{tmp_path / 'new.db'}" if is_sqlite else request.getfixturevalue("new_postgres_url")
    )

    with pytest.raises(Unavailable, match="lacks Lorry's table") as refusal:
        projects.ensure(database, "new")

    database.close()
    assert refusal.value.code == "database_not_set_up"


@ON_SQLITE
def test_sqlite_commits_are_synced_to_disk(db: Database) -> None:
    with db.read() as session:
        assert session.scalar(text("pragma synchronous")) == 2


@ON_POSTGRESQL
def test_dead_idle_connections_are_replaced_before_use(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catalog.db.database.IDLE_SECONDS", 0.0)
    with db.read(), db.read() as second, db.read() as third:  # opens three connections
        second.execute(text("select 1"))
        third.execute(text("select 1"))
    others = "datname = current_database() and pid != pg_backend_pid()"
    end_all = text(f"select pg_terminate_backend(pid) from pg_stat_activity where {others}")
    other = Database(db.url)
    with other.read() as session:
        session.execute(end_all)
    other.close()

    with db.write() as session, db.read() as reader:
        session.add(Organization(id="p", name="p", created_at=0))
        assert reader.scalars(select(Organization)).all() == []

    with db.read() as session:
        assert [row.id for row in session.scalars(select(Organization))] == ["p"]


@ON_POSTGRESQL
def test_stalled_write_transaction_is_ended_after_the_idle_timeout(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with db.write() as session:
        session.add(Organization(id="p", name="p", created_at=0))
        assert session.scalar(text("show idle_in_transaction_session_timeout")) == f"{STUCK_SECONDS}s"
    monkeypatch.setattr("catalog.db.database.STUCK_SECONDS", 5)
    stuck = Database(db.url)

    def stand_still() -> None:
        with stuck.write() as session:
            row = session.get_one(Organization, "p", with_for_update=True)
            with db.write() as other:  # waits for the row until the server ends the idle transaction
                other.get_one(Organization, "p", with_for_update=True).name = "theirs"
            row.name = "mine"
            session.flush()

    with pytest.raises(Unavailable):
        stand_still()

    with db.read() as session:
        assert session.get_one(Organization, "p").name == "theirs"
    stuck.close()


@ON_POSTGRESQL
def test_connection_in_use_at_close_is_closed_when_returned(db: Database) -> None:
    with db.read() as session:
        used: psycopg.Connection = session.connection().connection.driver_connection  # pyright: ignore[reportAssignmentType]
        db.close()
        assert session.scalar(text("select 1")) == 1

    assert used.closed
