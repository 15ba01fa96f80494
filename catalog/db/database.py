"""Engines, transactions, the database clock and row locks.

Only this package and catalog/maintenance/backup distinguish SQLite from PostgreSQL. Transactions are short: never hold
one during file access, a subprocess, a network call, or work whose duration a client controls (write_guard). Writers of
SQLite wait in a queue (write_queue).
"""

from __future__ import annotations

import hashlib
import logging
import math
import sqlite3
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from psycopg.abc import Buffer
from psycopg.adapt import Loader
from sqlalchemy import (
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    Executable,
    Float,
    FromClause,
    Select,
    Table,
    bindparam,
    case,
    create_engine,
    event,
    func,
    inspect,
    literal,
    make_url,
    select,
    text,
    true,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import InvalidatePoolError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session, SessionTransaction, sessionmaker
from sqlalchemy.sql.functions import GenericFunction

from catalog import write_guard
from catalog.db import revisions
from catalog.db.errors import busy, translated
from catalog.db.write_queue import FairLock, Turnstile, wait_until_next_poll

log = logging.getLogger("lorry.database")

BUSY_SECONDS = 30
BRIEF_MILLISECONDS = 100
POOL = {"pool_size": 10, "max_overflow": 30, "pool_timeout": 10}
"""Connection pool of a process. It exceeds the API server's 36 threads (routes, key checks and slow work), so that
background tasks also get a connection."""
STUCK_SECONDS = 30
"""PostgreSQL aborts a transaction whose client is idle for longer. Otherwise a client that is stopped or disconnected
during a write would keep its row locks for hours. Lorry keeps no transaction open during slow work."""
LONG_WRITE_SECONDS = 1.0
"""A write transaction whose work takes longer is logged, with the function that opened it. It is not aborted: its work
is already done, and on a slow machine a retry would hold the lock for as long again. The commit does not count, because
it waits for the disk. On SQLite, the processor time of the thread counts: its statements run there, and waits for the
disk or for a processor are not the transaction's fault. On PostgreSQL, the elapsed time counts."""
IDLE_SECONDS = 1.0
"""A connection that was idle for longer is tested before use."""
LAST = "last"
"""Key in a session's `info`: see `at_the_end`."""
ROWS = "rows"
"""Key in a session's `info`: see `get_once`."""
TableT = TypeVar("TableT", bound=DeclarativeBase)
SelectT = TypeVar("SelectT", bound="Select[*tuple[Any, ...]]")


class now(GenericFunction[float]):  # noqa: N801  (an SQL function's name)
    """Seconds since 1970 by the database's clock."""

    name = "lorry_now"
    type = Float(53)
    inherit_cache = True


@compiles(now, "sqlite")
def _sqlite_now(element: Any, compiler: Any, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _postgresql_now(element: Any, compiler: Any, **_: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


class Database:
    """A database, with methods that open short transactions."""

    def __init__(self, url: str, *, clock: Callable[[], float] | None = None) -> None:
        """clock: replaces the database's clock in tests; returns seconds since 1970."""
        self.url = url
        self.num_long_writes = 0
        """Number of this process's write transactions whose work took longer than LONG_WRITE_SECONDS."""
        self.engine = _engine(url)
        info = {"clock": clock}
        writing = self.engine.execution_options(lorry_immediate=True)
        # At READ COMMITTED, each statement sees the latest committed data, so a read transaction would add nothing.
        reading = self.engine if self.is_sqlite else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        repeating = self.engine if self.is_sqlite else self.engine.execution_options(isolation_level="REPEATABLE READ")
        self._readers = sessionmaker(reading, expire_on_commit=False, info=info)
        self._snapshots = sessionmaker(repeating, expire_on_commit=False, info=info)
        self._writers = sessionmaker(writing, expire_on_commit=False, info=info)
        event.listen(self._writers, "after_soft_rollback", _forget_rows)
        self._write_lock = FairLock()

    @contextmanager
    def read(self) -> Generator[Session]:
        """Open a session for reading. Its rows stay usable after it has closed.

        SQLite uses a transaction. PostgreSQL runs each statement in autocommit mode, which saves two round trips.
        """
        with translated(), self._readers.begin() as session:
            yield session

    @contextmanager
    def snapshot(self) -> Generator[Session]:
        """Like `read`, but every statement sees the same state of the database. Writers are not blocked."""
        with translated(), self._snapshots.begin() as session:
            yield session

    @contextmanager
    def write(self) -> Generator[Session]:
        """Open a write transaction. It takes SQLite's write lock immediately, so that it never fails halfway.

        Raises Unavailable if the database does not respond or stays locked for 30 s.
        """
        with self._writing(BUSY_SECONDS) as session:
            yield session
            for _, act in sorted(session.info.pop(LAST, {}).items()):
                act(session)

    @contextmanager
    def write_briefly(self) -> Generator[Session]:
        """Open a write transaction for optional writes: it waits for a lock for at most a tenth of a second."""
        with self._writing(BRIEF_MILLISECONDS / 1000) as session:
            if not self.is_sqlite:
                session.execute(text(f"set local lock_timeout = {BRIEF_MILLISECONDS}"))
            yield session

    @contextmanager
    def _writing(self, seconds: float) -> Generator[Session]:
        """Open a write transaction. On SQLite, raises Unavailable if it does not get the lock within `seconds`."""
        deadline = time.monotonic() + seconds
        with self._holding_write_lock(seconds), translated(), self._writers.begin() as session:
            session.connection(execution_options={"lorry_deadline": deadline})  # begin now, not at the first statement
            clock = time.thread_time if self.is_sqlite else time.monotonic
            began = clock()
            with write_guard.entered():
                yield session
            session.flush()
            worked_seconds = clock() - began
        if worked_seconds > LONG_WRITE_SECONDS:
            self.num_long_writes += 1
            log.warning("long write transaction seconds=%.1f by=%s", worked_seconds, _opener())

    @contextmanager
    def _holding_write_lock(self, seconds: float) -> Generator[None]:
        """Queue for SQLite's write lock among the threads of this process. Waiting threads hold no connection."""
        if not self.is_sqlite:
            yield
            return
        if not self._write_lock.acquire(seconds):
            raise busy()
        try:
            yield
        finally:
            self._write_lock.release()

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    def close(self) -> None:
        """Close all idle connections. Connections in use are closed when they return to the pool."""
        event.listen(self.engine.pool, "checkin", _end)
        self.engine.dispose()

    def migrate(self, revision: str = "head") -> None:
        """Migrate the tables to `revision`. Safe to call from several processes at once.

        Raises Conflict if the database has a revision that this code does not know.
        """
        with translated(), self.schema_connection() as connection:
            revisions.upgrade(connection, self.url, revision)

    @contextmanager
    def schema_connection(self) -> Generator[Connection]:
        """Open a transaction for schema changes. Only one process at a time can hold it."""
        with self.engine.connect().execution_options(lorry_immediate=True) as connection:
            if self.is_sqlite:
                # A batch migration recreates the table. Dropping the old one must not delete referencing rows.
                _foreign_keys(connection, enforced=False)
            try:
                with connection.begin():
                    if not self.is_sqlite:
                        connection.exec_driver_sql("select pg_advisory_xact_lock(7216)")
                    yield connection
            finally:
                if self.is_sqlite:
                    _foreign_keys(connection, enforced=True)


def skip_locked(statement: SelectT, of: type[DeclarativeBase] | None = None) -> SelectT:
    """Make `statement` lock the rows that it finds, and skip rows that another transaction has locked.

    of: lock only rows of this table. SQLite ignores row locks, because it has one writer at a time.
    """
    return statement.with_for_update(skip_locked=True, of=of)


def is_sqlite(session: Session) -> bool:
    return session.get_bind().dialect.name == "sqlite"


def each_of(
    groups: FromClause, ids: Select[Any], job: Any, names: Sequence[str], *, for_sqlite: bool
) -> Select[*tuple[Any, ...]]:
    """Select columns of the rows that the limited query `ids` finds for each row of `groups`.

    `job` is an alias of a table, and `ids` selects ids from it. PostgreSQL uses a lateral join, which returns the
    columns directly: before the tables are analyzed, a separate lookup by id would be planned as a full scan. SQLite
    has no lateral joins and uses `in`.
    """
    if for_sqlite:
        table: Any = inspect(job).mapper.class_
        return select(*(getattr(table, name) for name in names)).select_from(groups.join(table, table.id.in_(ids)))
    found = ids.with_only_columns(*(getattr(job, name) for name in names)).lateral("found_of_each")
    return select(*found.c).select_from(groups.join(found, true()))


def read_clock(session: Session) -> float:
    """Return the database's time, in seconds since 1970."""
    clock: Callable[[], float] | None = session.info.get("clock")
    return clock() if clock else session.scalar(select(now())) or 0.0


def clock_of(session: Session) -> ColumnElement[float]:
    """Return the database's time as a column, for use in a larger statement."""
    clock: Callable[[], float] | None = session.info.get("clock")
    return literal(clock(), Float(53)) if clock else now()


def clock_given(session: Session) -> dict[str, float]:
    """Return the parameters of a statement that uses `clock_column`: the time if a test replaces the clock."""
    clock: Callable[[], float] | None = session.info.get("clock")
    return {"clock": clock()} if clock else {}


def clock_column(*, is_given: bool) -> ColumnElement[float]:
    """Return the database's time as a column of a cached statement. is_given: `clock_given` supplies the time."""
    return bindparam("clock", type_=Float(53)) if is_given else now()


def get_once(
    session: Session, table: type[TableT], key: str, *, lock: Literal["share", "update"] | None = None
) -> TableT | None:
    """Return the row with this primary key; None if there is none.

    A transaction queries and locks each row only once, because a sweep creates many jobs of the same project, file and
    base model. (A session on its own keeps only weak references to rows.) Until the transaction ends, a "share" lock
    prevents others from changing the row, and an "update" lock also from locking it.
    """
    rows: dict[tuple[type[DeclarativeBase], str, str | None], Any] = session.info.setdefault(ROWS, {})
    row = rows.get((table, key, lock))
    if row is None:
        for_update = None if lock is None else {"read": lock == "share"}
        row = session.get(table, key, with_for_update=for_update, populate_existing=lock is not None)
        if row is not None:
            rows[table, key, lock] = row
    return row


def _forget_rows(session: Session, _: SessionTransaction) -> None:
    """Discard the rows of `get_once`: rolling back to a savepoint releases PostgreSQL's row locks taken since."""
    session.info.pop(ROWS, None)


def serialize(session: Session, name: str) -> None:
    """Take a named lock until this transaction ends.

    SQLite needs no lock, because it has one writer at a time. Do not use it within `read`: on PostgreSQL, each
    statement is a transaction of its own there, so the lock is released at once.
    """
    if not is_sqlite(session):
        session.execute(text("select pg_advisory_xact_lock(:number)"), {"number": _number(name)})


def serialized_at(session: Session, name: str) -> float:
    """Take an exclusive lock as `serialize` does, and return the database's time after the wait."""
    if is_sqlite(session):
        return read_clock(session)
    locked = select(func.pg_advisory_xact_lock(_number(name))).cte("locked")
    return session.execute(select(clock_of(session)).select_from(locked)).scalar_one()


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


def upsert(session: Session, table: type[DeclarativeBase], rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert the rows. A row whose primary key exists replaces the existing values."""
    if not rows:
        return
    key = [column.name for column in table.__mapper__.primary_key]
    module = sqlite if is_sqlite(session) else postgresql
    for row in rows:
        insert = module.insert(table).values(dict(row))
        changed = {name: insert.excluded[name] for name in row if name not in key}
        if changed:
            session.execute(insert.on_conflict_do_update(index_elements=key, set_=changed))
        else:
            session.execute(insert.on_conflict_do_nothing(index_elements=key))


def lower(session: Session, table: type[DeclarativeBase], row: Mapping[str, Any], name: str) -> None:
    """Insert the row. If its primary key exists, the lower of both values of the column `name` replaces the existing
    one. Waits for a concurrent insert or deletion of the key."""
    key = [column.name for column in table.__mapper__.primary_key]
    insert = (sqlite if is_sqlite(session) else postgresql).insert(table).values(dict(row))
    given, existing = insert.excluded[name], table.__table__.c[name]
    least = case((given < existing, given), else_=existing)
    session.execute(insert.on_conflict_do_update(index_elements=key, set_={name: least}))


def at_the_end(session: Session, name: str, act: Callable[[Session], None]) -> None:
    """Register `act` to be called with the session just before this write transaction commits, once for each name.

    The calls are sorted by name, so that all transactions lock rows in the same order.
    """
    session.info.setdefault(LAST, {})[name] = act


def add_to(
    session: Session, table: type[DeclarativeBase], key: Mapping[str, Any], amounts: Mapping[str, float]
) -> None:
    """Add the amounts to the row with this primary key, and create it if it is missing. One amount is not 0."""
    added = tuple(name for name, amount in amounts.items() if amount)
    session.execute(_adding(cast("Table", table.__table__), tuple(key), added, is_sqlite(session)), {**key, **amounts})


def add_all_to(
    session: Session,
    table: type[DeclarativeBase],
    key: tuple[str, ...],
    added: tuple[str, ...],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Add amounts to many rows as `add_to` does, in the given order."""
    statement = _adding(cast("Table", table.__table__), key, added, is_sqlite(session))
    session.execute(statement, [dict(row) for row in rows])


@cache
def _adding(table: Table, key: tuple[str, ...], added: tuple[str, ...], for_sqlite: bool) -> Executable:
    """Build the statement. It is cached because building it takes longer than executing it."""
    insert = sqlite.insert(table) if for_sqlite else postgresql.insert(table)
    sums = {name: table.c[name] + insert.excluded[name] for name in added}
    return insert.on_conflict_do_update(index_elements=list(key), set_=sums)


def add_if_missing(session: Session, table: type[DeclarativeBase], row: Mapping[str, Any]) -> None:
    """Insert the row unless its primary key exists. Waits for a concurrent insert of the same key."""
    module = sqlite if is_sqlite(session) else postgresql
    session.execute(module.insert(table).values(dict(row)).on_conflict_do_nothing())


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        turnstile = Turnstile(Path(parsed.database)) if parsed.database else None
        pool = POOL if parsed.database else {}  # an in-memory database has a single connection
        engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}, **pool)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", partial(_begin_sqlite, turnstile))
        return engine
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    engine = create_engine(parsed, **POOL)
    event.listen(engine, "connect", _prepare_postgresql)
    event.listen(engine, "checkin", _note_use)
    event.listen(engine, "checkout", partial(_try_idle, engine.dialect))
    return engine


def _end(_connection: Any, record: Any) -> None:
    record.invalidate()


def _note_use(_connection: Any, record: Any) -> None:
    record.info["used_at"] = time.monotonic()


def _try_idle(dialect: Dialect, connection: Any, record: Any, _proxy: Any) -> None:
    """Test a connection that was idle. SQLAlchemy's `pool_pre_ping` would add a round trip to every request."""
    if time.monotonic() - record.info.get("used_at", math.inf) < IDLE_SECONDS:
        return
    try:
        dialect.do_ping(connection)
    except Exception as error:  # all open connections may be broken: the pool replaces them
        raise InvalidatePoolError from error


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # pysqlite must not begin transactions implicitly
    _use_wal(connection)
    # FULL: committed data survives a power failure.
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


class _NumericLoader(Loader):
    """Reads PostgreSQL's `numeric`, the type of its sums of `bigint`, like SQLite does: `Decimal` is not valid JSON."""

    def load(self, data: Buffer) -> int | float:
        number = bytes(data)
        return int(number) if number.removeprefix(b"-").isdigit() else float(number)


def _prepare_postgresql(connection: Any, _record: Any) -> None:
    """Configure a connection. JIT compilation adds 0.3 s to a query: the planner chooses it for large tables, but it
    never pays off for Lorry's queries."""
    connection.adapters.register_loader("numeric", _NumericLoader)
    connection.autocommit = True
    connection.execute("set jit = off")
    connection.execute(f"set idle_in_transaction_session_timeout = '{STUCK_SECONDS}s'")
    connection.autocommit = False


def _use_wal(connection: Any) -> None:
    """Enable WAL mode, with retries: SQLite does not wait for the lock if several processes create the file at once."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _begin_sqlite(turnstile: Turnstile | None, connection: Connection) -> None:
    options = connection.get_execution_options()
    if not options.get("lorry_immediate", False):
        connection.exec_driver_sql("BEGIN")
        return
    deadline = options.get("lorry_deadline", time.monotonic() + BUSY_SECONDS)
    with turnstile.held(deadline) if turnstile is not None else nullcontext():
        _begin_immediate(connection, deadline)


def _begin_immediate(connection: Connection, deadline: float) -> None:
    """Poll for the write lock: SQLite's own wait sleeps for up to 0.1 s while the lock is free."""
    driver: Any = connection.connection.driver_connection
    driver.execute("PRAGMA busy_timeout=0")
    try:
        while not _has_begun(driver):
            wait_until_next_poll(deadline)
    finally:
        driver.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")


def _has_begun(driver: sqlite3.Connection) -> bool:
    """False while another connection holds the write lock."""
    try:
        driver.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
            return False
        raise OperationalError("BEGIN IMMEDIATE", None, error) from error
    return True


def _opener() -> str:
    """Return the name of the function whose `with` statement has just closed a transaction."""
    own = (__name__, "contextlib")
    frames = (frame for frame, _ in traceback.walk_stack(None) if frame.f_globals["__name__"] not in own)
    return next((f"{frame.f_globals['__name__']}.{frame.f_code.co_name}" for frame in frames), "unknown")


def _foreign_keys(connection: Connection, *, enforced: bool) -> None:
    driver: Any = connection.connection.driver_connection  # the pragma does nothing inside a transaction
    driver.execute(f"PRAGMA foreign_keys={'ON' if enforced else 'OFF'}")
