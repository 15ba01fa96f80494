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
    return Unavailable("database_connections_used_up")


def _not_set_up(text: str) -> Unavailable:
    found = MISSING_TABLE.search(text)
    name = (found[1] or found[2]) if found else "alembic_version"
    return Unavailable("database_table_missing", name=name)


def _denied(detail: str) -> Unavailable:
    return Unavailable(
        "database_privilege_missing" if "schema" in detail else "database_table_privilege_missing", detail=detail
    )


def _outage(error: DBAPIError, sqlstate: str) -> Unavailable:
    sqlite_code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    if sqlite_code in BUSY or sqlstate in LOCKED:
        return busy()
    if sqlite_code in NOT_ACCESSIBLE:
        return Unavailable("database_not_writable", detail=_detail(error))
    if sqlite_code == sqlite3.SQLITE_IOERR:
        return Unavailable("database_io_error", detail=_detail(error))
    if sqlstate == READ_ONLY:
        return Unavailable("database_read_only")
    if LOGIN_REJECTED.search(str(error.orig)):
        return Unavailable("database_login_rejected")
    return _crowded() if TOO_MANY_CONNECTIONS.search(str(error.orig)) else silent()


def _crowded() -> Unavailable:
    return Unavailable("database_server_connections_used_up")


def _unstorable(error: DBAPIError | UnicodeEncodeError | OverflowError, sqlstate: str) -> InvalidRequest:
    if isinstance(error, UnicodeEncodeError):
        excerpt = _excerpt(error.object, error.start)
        return InvalidRequest("unpaired_surrogate", excerpt=excerpt)
    if isinstance(error, OverflowError) or sqlstate == TOO_LARGE:
        number = _largest(error)
        if number is None:
            return InvalidRequest("unknown_number_too_large")
        return InvalidRequest("stored_number_too_large", number=number)
    if sqlstate in NUL:
        excerpt = _nul(error)
        if excerpt is None:
            return InvalidRequest("nul_character")
        return InvalidRequest("nul_character_in_text", excerpt=excerpt)
    return InvalidRequest("unstorable_value", detail=_detail(error))


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
    return OutOfSpace("disk_full")


def busy() -> Unavailable:
    return Unavailable("database_busy")


def silent() -> DatabaseSilent:
    return DatabaseSilent("database_unavailable")
