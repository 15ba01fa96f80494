"""Translation of database errors that users can act on: outages, full disks, invalid values. Others are bugs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from catalog.errors import InvalidRequest, LorryError, OutOfSpace, Unavailable

NO_SUCH_TABLE, DENIED, READ_ONLY, TOO_LARGE, INTERVENED = "42P01", "42501", "25006", "22003", "57"
"""SQLSTATEs of PostgreSQL. 57 is the class of operator interventions, such as a shutdown."""


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
        return Unavailable(
            "The database has no Lorry tables.",
            code="database_not_set_up",
            remedy="Create them: `python -m api bootstrap`.",
        )
    if sqlstate == DENIED:
        return Unavailable(
            "The database role in LORRY_DATABASE_URL lacks a required privilege.",
            code="database_permission_denied",
            remedy="Check that the role is correct. To grant each role its privileges, run `python -m api bootstrap` "
            "as the owner of the tables.",
        )
    if isinstance(error, DataError | UnicodeEncodeError | OverflowError):
        return _unstorable(error)
    if isinstance(error, DBAPIError):
        is_outage = isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated
        is_outage = is_outage or sqlstate == READ_ONLY or sqlstate.startswith(INTERVENED)
        if not is_outage:
            return None
    return silent()


def _unstorable(error: DBAPIError | UnicodeEncodeError | OverflowError) -> InvalidRequest:
    if isinstance(error, UnicodeEncodeError):
        return InvalidRequest(
            "The request contains an unpaired surrogate, which is not a valid character.",
            code="unstorable_value",
            remedy="Remove it, or send the complete character.",
        )
    if isinstance(error, OverflowError) or getattr(error.orig, "sqlstate", None) == TOO_LARGE:
        return InvalidRequest(
            "The request contains a number that is too large to store.",
            code="unstorable_value",
            remedy="Use a smaller number.",
        )
    return InvalidRequest(
        "The request contains a NUL character, which can't be stored.",
        code="unstorable_value",
        remedy="Remove the NUL character.",
    )


def disk_full() -> OutOfSpace:
    return OutOfSpace(
        "The disk that holds the database is full.",
        code="disk_full",
        remedy="Nothing was changed. Free up space on that disk, then try again.",
    )


def silent() -> Unavailable:
    return Unavailable(
        "The database is not responding.",
        code="database_unavailable",
        remedy="Try again in a few seconds. To prevent a request from being applied twice, use an Idempotency-Key.",
    )
