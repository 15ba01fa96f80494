"""Engines, transactions, the clock, locked rows. Only this package and catalog/maintenance/backup distinguish SQLite
from PostgreSQL.

A transaction is short: never hold one across a file, a process, a network call, or work whose duration a client
decides (write_guard). Writers of SQLite queue (write_queue).
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

from alembic import command
from sqlalchemy import (
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    Executable,
    Float,
    FromClause,
    Integer,
    Select,
    Table,
    bindparam,
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
from catalog.db.errors import silent, translated
from catalog.db.write_queue import FairLock, Turnstile, wait_until_next_poll

log = logging.getLogger("lorry.database")

BUSY_SECONDS = 30
BRIEF_MILLISECONDS = 100
POOL = {"pool_size": 10, "max_overflow": 30, "pool_timeout": 10}
"""Connections of a process: more than the API server has threads for routes, the check of keys and slow work (36), so
that background tasks find one."""
STUCK_SECONDS = 30
"""PostgreSQL ends a transaction whose client says nothing for so long: stopped or cut off amid a write, it would hold
its rows for hours. No transaction of ours is open across anything slow."""
LONG_WRITE_SECONDS = 1.0
"""A write transaction that is open for longer is logged, with the function that opened it. It is not aborted: the work
is done by then, and on a slow machine a retry would hold the lock for as long again."""
IDLE_SECONDS = 1.0
"""A connection that was not used for so long is tried before it is."""
LAST = "last"
"""In a session's `info`: see `at_the_end`."""
ROWS = "rows"
"""In a session's `info`: see `get_once`."""
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


class find_in(GenericFunction[int]):  # noqa: N801
    """Where in a text another begins, from 1."""

    name = "lorry_find_in"
    type = Integer()
    inherit_cache = True


@compiles(find_in, "sqlite")
def _sqlite_find_in(element: Any, compiler: Any, **given: Any) -> str:
    return f"instr({compiler.process(element.clauses, **given)})"


@compiles(find_in, "postgresql")
def _postgresql_find_in(element: Any, compiler: Any, **given: Any) -> str:
    return f"strpos({compiler.process(element.clauses, **given)})"


class Database:
    """A place to open short transactions in."""

    def __init__(self, url: str, *, clock: Callable[[], float] | None = None) -> None:
        """`clock` stands in for the database's own, in seconds since 1970: for tests that turn it."""
        self.url = url
        self.num_long_writes = 0
        """Write transactions of this process that were open for longer than LONG_WRITE_SECONDS."""
        self.engine = _engine(url)
        info = {"clock": clock}
        writing = self.engine.execution_options(lorry_immediate=True)
        # At READ COMMITTED each statement sees what is committed by then, in a transaction or not.
        reading = self.engine if self.is_sqlite else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._readers = sessionmaker(reading, expire_on_commit=False, info=info)
        self._writers = sessionmaker(writing, expire_on_commit=False, info=info)
        event.listen(self._writers, "after_soft_rollback", _forget_rows)
        self._write_lock = FairLock()

    @contextmanager
    def read(self) -> Generator[Session]:
        """To write nothing: on SQLite a transaction, on PostgreSQL statements each on its own, which saves two ways to
        the server. Rows stay usable after it has closed."""
        with translated(), self._readers.begin() as session:
            yield session

    @contextmanager
    def write(self) -> Generator[Session]:
        """A transaction that takes SQLite's write lock at once, so that it never fails half way.

        Raises Unavailable where the database does not answer or stays locked for 30 s.
        """
        with self._writing(BUSY_SECONDS) as session:
            yield session
            for _, act in sorted(session.info.pop(LAST, {}).items()):
                act(session)

    @contextmanager
    def write_briefly(self) -> Generator[Session]:
        """As `write`, for what may as well be left out: waits for no lock longer than a tenth of a second."""
        with self._writing(BRIEF_MILLISECONDS / 1000) as session:
            if not self.is_sqlite:
                session.execute(text(f"set local lock_timeout = {BRIEF_MILLISECONDS}"))
            yield session

    @contextmanager
    def _writing(self, seconds: float) -> Generator[Session]:
        """A write transaction, which on SQLite waits for the lock for at most `seconds`. Raises Unavailable then."""
        deadline = time.monotonic() + seconds
        with self._holding_write_lock(seconds), translated(), self._writers.begin() as session:
            session.connection(execution_options={"lorry_deadline": deadline})  # begins now, not at the first statement
            began = time.monotonic()
            with write_guard.entered():
                yield session
        self._note_duration(time.monotonic() - began)

    @contextmanager
    def _holding_write_lock(self, seconds: float) -> Generator[None]:
        """Threads of one process queue for SQLite's write lock, and take no connection meanwhile."""
        if not self.is_sqlite:
            yield
            return
        if not self._write_lock.acquire(seconds):
            raise silent()
        try:
            yield
        finally:
            self._write_lock.release()

    def _note_duration(self, seconds: float) -> None:
        if seconds > LONG_WRITE_SECONDS:
            self.num_long_writes += 1
            log.warning("long write transaction seconds=%.1f by=%s", seconds, _opener())

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    def close(self) -> None:
        """Connections that are in use end when they are given back."""
        event.listen(self.engine.pool, "checkin", _end)
        self.engine.dispose()

    def migrate(self, revision: str = "head") -> None:
        """Bring the tables to `revision`. Safe to call from several processes at once.

        Raises Conflict where the database has a revision that this code does not know.
        """
        config = revisions.alembic_config(self.url)
        with translated(), self.schema_connection() as connection:
            revisions.check_known(connection)
            config.attributes["connection"] = connection
            command.upgrade(config, revision)

    @contextmanager
    def schema_connection(self) -> Generator[Connection]:
        """A transaction for changing tables, one process at a time."""
        with self.engine.connect().execution_options(lorry_immediate=True) as connection:
            if self.is_sqlite:
                # A table is changed by making it anew; its rows' children must not go with the old one.
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
    """Lock the rows that `statement` finds, of one table or of all, and pass over those that another transaction holds.

    SQLite has one writer at a time and ignores it.
    """
    return statement.with_for_update(skip_locked=True, of=of)


def is_sqlite(session: Session) -> bool:
    return session.get_bind().dialect.name == "sqlite"


def each_of(
    groups: FromClause, ids: Select[Any], job: Any, names: Sequence[str], *, for_sqlite: bool
) -> Select[*tuple[Any, ...]]:
    """Columns of the rows whose ids the query `ids` of `job`, an alias of a table, finds for each line of `groups`.

    The query is limited. PostgreSQL asks it for a line by a lateral join, which gives the columns at once: to find the
    rows by their ids afterwards is planned as a look at all there are where nothing was analyzed yet. SQLite knows no
    such join; there it is asked by `in`.
    """
    if for_sqlite:
        table: Any = inspect(job).mapper.class_
        return select(*(getattr(table, name) for name in names)).select_from(groups.join(table, table.id.in_(ids)))
    found = ids.with_only_columns(*(getattr(job, name) for name in names)).lateral("found_of_each")
    return select(*found.c).select_from(groups.join(found, true()))


def read_clock(session: Session) -> float:
    """The database's time, in seconds since 1970."""
    clock: Callable[[], float] | None = session.info.get("clock")
    return clock() if clock else session.scalar(select(now())) or 0.0


def clock_of(session: Session) -> ColumnElement[float]:
    """The database's time as a column, to read it with something else."""
    clock: Callable[[], float] | None = session.info.get("clock")
    return literal(clock(), Float(53)) if clock else now()


def clock_given(session: Session) -> dict[str, float]:
    """What a statement with `clock_column` is to be told: the time, where a test's clock stands in."""
    clock: Callable[[], float] | None = session.info.get("clock")
    return {"clock": clock()} if clock else {}


def clock_column(*, is_given: bool) -> ColumnElement[float]:
    """The database's time, in a statement that is made once. is_given: by `clock_given`."""
    return bindparam("clock", type_=Float(53)) if is_given else now()


def get_once(
    session: Session, table: type[TableT], key: str, *, lock: Literal["share", "update"] | None = None
) -> TableT | None:
    """The row with that primary key, None if there is none. A transaction queries and locks each row once, because a
    sweep creates many jobs of the same project, file and base model. (By itself, a session forgets unused rows.)

    Until this transaction ends, "share" keeps others from changing the row, "update" from locking it too.
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
    """PostgreSQL releases at a savepoint's rollback what was locked since."""
    session.info.pop(ROWS, None)


def serialize(session: Session, name: str, *, shared: bool = False) -> None:
    """Until this transaction ends, others that name the same thing wait; those that share it wait only for one that
    does not. SQLite has one writer anyway. Within `read` it holds nothing: PostgreSQL's statements are alone there."""
    if not is_sqlite(session):
        lock = "pg_advisory_xact_lock_shared" if shared else "pg_advisory_xact_lock"
        session.execute(text(f"select {lock}(:number)"), {"number": _number(name)})


def serialized_at(session: Session, name: str) -> float:
    """As `serialize`, and the database's time once nobody is waited for."""
    if is_sqlite(session):
        return read_clock(session)
    locked = select(func.pg_advisory_xact_lock(_number(name))).cte("locked")
    return session.execute(select(clock_of(session)).select_from(locked)).scalar_one()


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


def upsert(session: Session, table: type[DeclarativeBase], rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert the rows; one whose primary key exists takes the place of what was there."""
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


def at_the_end(session: Session, name: str, act: Callable[[Session], None]) -> None:
    """Call `act` with the session before this writing transaction ends well, once for each name: in the order of the
    names, so that all transactions write what they end with in one order."""
    session.info.setdefault(LAST, {})[name] = act


def add_to(
    session: Session, table: type[DeclarativeBase], key: Mapping[str, Any], amounts: Mapping[str, float]
) -> None:
    """Add the amounts, not all of them 0, to the row with this primary key, which is made where there is none."""
    added = tuple(name for name, amount in amounts.items() if amount)
    session.execute(_adding(cast("Table", table.__table__), tuple(key), added, is_sqlite(session)), {**key, **amounts})


def add_all_to(
    session: Session,
    table: type[DeclarativeBase],
    key: tuple[str, ...],
    added: tuple[str, ...],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """As `add_to`, for many rows at once, in their order."""
    statement = _adding(cast("Table", table.__table__), key, added, is_sqlite(session))
    session.execute(statement, [dict(row) for row in rows])


@cache
def _adding(table: Table, key: tuple[str, ...], added: tuple[str, ...], for_sqlite: bool) -> Executable:
    """Kept, for making it takes longer than its answer."""
    insert = sqlite.insert(table) if for_sqlite else postgresql.insert(table)
    sums = {name: table.c[name] + insert.excluded[name] for name in added}
    return insert.on_conflict_do_update(index_elements=list(key), set_=sums)


def add_if_missing(session: Session, table: type[DeclarativeBase], row: Mapping[str, Any]) -> None:
    """Insert the row, unless one with its primary key is there or is being inserted: that is waited for."""
    module = sqlite if is_sqlite(session) else postgresql
    session.execute(module.insert(table).values(dict(row)).on_conflict_do_nothing())


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        turnstile = Turnstile(Path(parsed.database)) if parsed.database else None
        pool = POOL if parsed.database else {}  # one in memory has a single connection
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
    """The pool's own `pool_pre_ping` tries before each use: one way to the server more for each request."""
    if time.monotonic() - record.info.get("used_at", math.inf) < IDLE_SECONDS:
        return
    try:
        dialect.do_ping(connection)
    except Exception as error:  # whatever it is: all that are open may be as dead, and the pool opens others
        raise InvalidatePoolError from error


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # pysqlite must not begin transactions by itself
    _use_wal(connection)
    # FULL: what was accepted outlives a power cut.
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _prepare_postgresql(connection: Any, _record: Any) -> None:
    """Compiled, a question takes 0.3 s longer; in a large database it looks worth that, and never is."""
    connection.autocommit = True
    connection.execute("set jit = off")
    connection.execute(f"set idle_in_transaction_session_timeout = '{STUCK_SECONDS}s'")
    connection.autocommit = False


def _use_wal(connection: Any) -> None:
    """SQLite does not wait for the lock here: of several who make one file at once, all but one are turned away."""
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
    """The function whose `with` statement has just closed a transaction."""
    own = (__name__, "contextlib")
    frames = (frame for frame, _ in traceback.walk_stack(None) if frame.f_globals["__name__"] not in own)
    return next((f"{frame.f_globals['__name__']}.{frame.f_code.co_name}" for frame in frames), "unknown")


def _foreign_keys(connection: Connection, *, enforced: bool) -> None:
    driver: Any = connection.connection.driver_connection  # the pragma does nothing inside a transaction
    driver.execute(f"PRAGMA foreign_keys={'ON' if enforced else 'OFF'}")
