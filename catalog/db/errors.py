"""Translates database errors that users can act on: outages, full disks, invalid values. Others are bugs."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from catalog.errors import InvalidRequest, LorryError, OutOfSpace, Unavailable

NO_SUCH_TABLE, DENIED, READ_ONLY, TOO_LARGE, INTERVENED = "42P01", "42501", "25006", "22003", "57"
"""SQLSTATEs of PostgreSQL. 57 is the class of operator interventions, such as a shutdown."""
NUL = ("None", "22021", "22P05")
"""SQLSTATEs of a NUL character. psycopg finds some itself, without a SQLSTATE."""
LOCKED = ("40001", "40P01", "55P03")
"""SQLSTATEs of a conflict with another transaction."""
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
NOT_ACCESSIBLE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)
MISSING_TABLE = re.compile(r"""no such table: (?:main\.)?(\w+)|relation "([^"]+)" does not exist""")
LOGIN_REJECTED = re.compile(
    "authentication failed|no password supplied|no pg_hba.conf entry|not permitted to log in|"
    'permission denied for database|(role|database) "[^"]*" does not exist'
)
"""Texts of PostgreSQL, whose connection errors have no SQLSTATE."""
TOO_MANY_CONNECTIONS = re.compile(
    "too many clients|too many connections|remaining connection slots|no more connections allowed"
)
EXCERPT = 20
"""Number of characters on each side of an invalid character that a message shows."""


class DatabaseSilent(Unavailable):
    """The database can't be reached, or the connection was lost. A transaction may or may not have been committed."""


@contextmanager
def translated() -> Generator[None]:
    try:
        yield
    except (DBAPIError, PoolTimeout, UnicodeEncodeError, OverflowError) as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        raise refusal from error


def _refusal(error: DBAPIError | PoolTimeout | UnicodeEncodeError | OverflowError) -> LorryError | None:
    """Return the error to report to the user; None if it is a bug in Lorry."""
    if "disk is full" in str(error) or "No space left" in str(error):
        return disk_full()
    sqlstate = str(getattr(error.orig, "sqlstate", None)) if isinstance(error, DBAPIError) else ""
    if sqlstate == NO_SUCH_TABLE or "no such table" in str(error):
        return _not_set_up(str(error))
    if isinstance(error, DBAPIError) and sqlstate == DENIED:
        return _denied(_detail(error))
    if isinstance(error, DataError | UnicodeEncodeError | OverflowError):
        return _unstorable(error, sqlstate)
    if isinstance(error, DBAPIError):
        is_outage = isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
        is_outage = is_outage or sqlstate == READ_ONLY or sqlstate.startswith(INTERVENED)
        return _outage(error, sqlstate) if is_outage else None
    assert isinstance(error, PoolTimeout)
    return Unavailable(
        "All of this process's database connections are in use.",
        code="database_unavailable",
        remedy="Nothing was changed. Try again in a few seconds.",
    )


def _not_set_up(text: str) -> Unavailable:
    found = MISSING_TABLE.search(text)
    name = (found[1] or found[2]) if found else "alembic_version"
    return Unavailable(
        f"The database lacks Lorry's table {name}.",
        code="database_not_set_up",
        remedy="Check that LORRY_DATABASE_URL, or LORRY_DATA_DIR if it is not set, points to Lorry's database. Then "
        "create the tables: `python -m api bootstrap`.",
    )


def _denied(detail: str) -> Unavailable:
    owned = "database" if "schema" in detail else "tables"
    return Unavailable(
        f"The database role in LORRY_DATABASE_URL lacks a required privilege: {detail}.",
        code="database_permission_denied",
        remedy=f"In LORRY_DATABASE_URL, use the owner of the {owned}, or the role lorry_api or lorry_worker. To grant "
        "these roles their privileges, run `python -m api bootstrap` as the owner.",
    )


def _outage(error: DBAPIError, sqlstate: str) -> Unavailable:
    sqlite_code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    if sqlite_code in BUSY or sqlstate in LOCKED:
        return busy()
    if sqlite_code in NOT_ACCESSIBLE:
        return Unavailable(
            f"SQLite can't open or write to the database: {_detail(error)}.",
            code="database_unavailable",
            remedy="Check that the folder of the database exists and is writable, and that the user who runs Lorry's "
            "processes owns its files. Check the limit on open files (`ulimit -n`).",
        )
    if sqlite_code == sqlite3.SQLITE_IOERR:
        return Unavailable(
            f"The system reported an I/O error for the SQLite database: {_detail(error)}.",
            code="database_unavailable",
            remedy="Check the disk and the file system that hold the database, for example with `dmesg`. SQLite needs "
            "a local file system. Then try again.",
        )
    if sqlstate == READ_ONLY:
        return Unavailable(
            "The database is read-only.",
            code="database_unavailable",
            remedy="Try again in a few seconds. If the error persists, set LORRY_DATABASE_URL to the primary server "
            "rather than a standby, and check that default_transaction_read_only is off.",
        )
    if LOGIN_REJECTED.search(str(error.orig)):
        return Unavailable(
            "PostgreSQL rejected the login with LORRY_DATABASE_URL.",
            code="database_unavailable",
            remedy="Check the role, password and database name in LORRY_DATABASE_URL, and pg_hba.conf on the server. "
            "The server's log states the reason.",
        )
    return _crowded() if TOO_MANY_CONNECTIONS.search(str(error.orig)) else silent()


def _crowded() -> Unavailable:
    return Unavailable(
        "PostgreSQL has reached its maximum number of connections.",
        code="database_unavailable",
        remedy="Try again in a few seconds. If this recurs, increase max_connections on the PostgreSQL server (or the "
        "limit of the role, database or pooler), or run fewer Lorry processes.",
    )


def _unstorable(error: DBAPIError | UnicodeEncodeError | OverflowError, sqlstate: str) -> InvalidRequest:
    if isinstance(error, UnicodeEncodeError):
        excerpt = _excerpt(error.object, error.start)
        return InvalidRequest(
            f"The text {excerpt} contains an unpaired surrogate, which is not a valid character.",
            code="unstorable_value",
            remedy="Remove the surrogate, or send the complete character.",
        )
    if isinstance(error, OverflowError) or sqlstate == TOO_LARGE:
        number = _largest(error)
        return InvalidRequest(
            "A number in the request is too large to store."
            if number is None
            else f"The number {number} in the request is too large to store.",
            code="unstorable_value",
            remedy="Use a number from -2,147,483,648 to 2,147,483,647, which always fits.",
        )
    if sqlstate in NUL:
        excerpt = _nul(error)
        return InvalidRequest(
            "The request contains a NUL character, which can't be stored."
            if excerpt is None
            else f"The text {excerpt} contains a NUL character, which can't be stored.",
            code="unstorable_value",
            remedy="Remove the NUL character.",
        )
    return InvalidRequest(
        f"The database can't store a value in the request: {_detail(error)}.",
        code="unstorable_value",
        remedy="Correct or shorten this value.",
    )


def _detail(error: DBAPIError) -> str:
    """Return the driver's message without the statement, its values and hints."""
    primary = getattr(getattr(error.orig, "diag", None), "message_primary", None)
    return (primary or str(error.orig).partition("\n")[0]).rstrip(".")


def _excerpt(text: str, at: int) -> str:
    return repr(text[max(0, at - EXCERPT) : at + EXCERPT])


def _nul(error: DBAPIError) -> str | None:
    """Return the text around the first NUL character in the statement's values, which may be JSON."""
    for value in _values(error.params):
        if isinstance(value, str):
            for nul in ("\0", r"\u0000"):
                if nul in value:
                    return _excerpt(value, value.index(nul))
    return None


def _largest(error: DBAPIError | OverflowError) -> int | None:
    """Return the largest number in the statement's values; None if SQLite's driver raised the error, without them."""
    if isinstance(error, OverflowError):
        return None
    numbers = [value for value in _values(error.params) if isinstance(value, int)]
    return max(numbers, key=abs, default=None)


def _values(params: Any) -> Iterator[Any]:
    if isinstance(params, dict):
        params = list(params.values())  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(params, list | tuple):
        for each in params:  # pyright: ignore[reportUnknownVariableType]
            yield from _values(each)
    else:
        yield params


def disk_full() -> OutOfSpace:
    return OutOfSpace(
        "The disk that holds the database is full.",
        code="disk_full",
        remedy="Nothing was changed. Free up space on that disk, then try again.",
    )


def busy() -> Unavailable:
    return Unavailable(
        "The database is busy: another transaction holds a lock that this operation needs.",
        code="database_unavailable",
        remedy="Nothing was changed. Try again in a few seconds. If this recurs, look for 'long write transaction' in "
        "the logs of Lorry's processes.",
    )


def silent() -> DatabaseSilent:
    return DatabaseSilent(
        "The database is not responding.",
        code="database_unavailable",
        remedy="Try again in a few seconds, with an Idempotency-Key to apply a request only once. If this recurs, "
        "check that the database is running and LORRY_DATABASE_URL is correct.",
    )
