"""The only file that knows SQLite from PostgreSQL: engines, transactions, the clock, skipping locked rows.

A transaction is short: never hold one across a file, a process or a network call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, Float, Select, create_engine, event, make_url, select
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.sql.functions import GenericFunction

from catalog.errors import Unavailable

BUSY_SECONDS = 30
RowT = TypeVar("RowT", bound=tuple[Any, ...])


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
    """A place to open short transactions in."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _engine(url)
        self._readers = sessionmaker(self.engine, expire_on_commit=False)
        self._writers = sessionmaker(self.engine.execution_options(lorry_immediate=True), expire_on_commit=False)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that writes nothing. Rows stay usable after it has closed."""
        with _translated(), self._readers.begin() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that takes SQLite's write lock at once, so that it never fails half way.

        Raises Unavailable where the database does not answer or stays locked for 30 s.
        """
        with _translated(), self._writers.begin() as session:
            session.connection()  # begins now, not at the first statement
            yield session

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    def close(self) -> None:
        self.engine.dispose()

    def migrate(self, revision: str = "head") -> None:
        """Bring the tables to `revision`. Safe to call from several processes at once."""
        config = alembic_config(self.url)
        if not self.is_sqlite:
            with self.engine.begin() as connection:
                connection.exec_driver_sql("select pg_advisory_xact_lock(7216)")
                config.attributes["connection"] = connection
                command.upgrade(config, revision)
            return
        with self.engine.connect().execution_options(lorry_immediate=True) as connection, connection.begin():
            config.attributes["connection"] = connection
            command.upgrade(config, revision)


def alembic_config(url: str) -> Config:
    """Alembic's configuration for `url`; the scripts are in the `migrations` package beside this one."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent.parent / "migrations"))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def skip_locked(statement: Select[RowT]) -> Select[RowT]:
    """Lock the rows that `statement` finds and pass over those that another transaction holds.

    SQLite has one writer at a time and ignores it.
    """
    return statement.with_for_update(skip_locked=True)


def read_clock(session: Session) -> float:
    """The database's time, in seconds since 1970."""
    return session.scalar(select(now())) or 0.0


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return create_engine(parsed, pool_pre_ping=True, pool_size=10, max_overflow=20, pool_timeout=10)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # pysqlite must not begin transactions by itself
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Any) -> None:
    immediate = connection.get_execution_options().get("lorry_immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (OperationalError, DBAPIError) as error:
        if isinstance(error, OperationalError) or error.connection_invalidated:
            raise Unavailable(
                "The database does not answer.",
                code="database_unavailable",
                remedy="Nothing was changed. Try again in a few seconds.",
            ) from error
        raise
