"""Each kind of database error is reported with its own cause and fix."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DataError, DBAPIError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from catalog.db import write_queue
from catalog.db.database import Database
from catalog.db.errors import translated
from catalog.errors import LorryError, OutOfSpace


class FromPostgresql(Exception):
    """An error of psycopg."""

    def __init__(self, message: str, sqlstate: str | None) -> None:
        super().__init__(f"{message}\nLINE 1: secret statement")
        self.sqlstate = sqlstate
        self.diag = SimpleNamespace(message_primary=message if sqlstate else None)


def postgresql(kind: type[DBAPIError], message: str, sqlstate: str | None, params: Any = None) -> DBAPIError:
    return kind("secret statement", params, FromPostgresql(message, sqlstate))


def sqlite(message: str, code: int) -> DBAPIError:
    error = sqlite3.OperationalError(message)
    error.sqlite_errorcode = code
    return OperationalError("secret statement", None, error)


def reported(error: BaseException) -> LorryError:
    with pytest.raises(LorryError) as caught, translated():
        raise error
    assert "secret" not in caught.value.sentence()
    return caught.value


@pytest.mark.parametrize(
    ("error", "message", "remedy"),
    [
        (sqlite("database is locked", sqlite3.SQLITE_BUSY), "database is busy", "long write transaction"),
        (postgresql(OperationalError, "deadlock detected", "40P01"), "database is busy", "Nothing was changed"),
        (sqlite("unable to open database file", sqlite3.SQLITE_CANTOPEN), "unable to open database file.", "writable"),
        (sqlite("disk I/O error", sqlite3.SQLITE_IOERR | 1 << 8), "disk I/O error.", "Check the disk"),
        (postgresql(DBAPIError, "read-only transaction", "25006"), "is read-only", "primary server"),
        (postgresql(OperationalError, 'FATAL:  role "x" does not exist', None), "rejected the login", "pg_hba.conf"),
        (postgresql(OperationalError, "FATAL:  sorry, too many clients already", None), "maximum", "max_connections"),
        (postgresql(OperationalError, "Connection refused", None), "not responding", "LORRY_DATABASE_URL is correct"),
        (PoolTimeout("QueuePool limit"), "connections are in use", "Try again"),
        (
            postgresql(ProgrammingError, "permission denied for table jobs", "42501"),
            "lacks a required privilege: permission denied for table jobs.",
            "use the owner of the tables, or the role lorry_api or lorry_worker.",
        ),
        (
            postgresql(ProgrammingError, "permission denied for schema public", "42501"),
            "permission denied for schema public.",
            "as the owner",
        ),
        (
            postgresql(ProgrammingError, 'relation "jobs" does not exist', "42P01"),
            "lacks Lorry's table jobs.",
            "python -m api bootstrap",
        ),
        (sqlite("no such table: main.jobs", sqlite3.SQLITE_ERROR), "lacks Lorry's table jobs.", "LORRY_DATA_DIR"),
    ],
)
def test_operator_learns_the_cause_and_its_fix(error: BaseException, message: str, remedy: str) -> None:
    found = reported(error)

    assert message in found.message
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (postgresql(DataError, "NUL", None, {"id": 1, "name": "a\0b"}), r"The text 'a\x00b' contains a NUL character"),
        (postgresql(DataError, "NUL", "22P05", ({"x": '{"k": "a\\u0000"}'},)), "a\\\\u0000"),
        (postgresql(DataError, "NUL", None), "The request contains a NUL character"),
        (postgresql(DataError, "out of range", "22003", {"a": 7, "b": -(2**70)}), f"The number {-(2**70)} in the"),
        (OverflowError("too large"), "A number in the request is too large"),
        (postgresql(DataError, "value too long for type character varying(255)", "22001"), "varying(255)."),
        (UnicodeEncodeError("utf-8", "half \ud800", 5, 6, "surrogate"), r"The text 'half \ud800' contains an unpaired"),
    ],
)
def test_unstorable_value_is_named(error: BaseException, message: str) -> None:
    found = reported(error)

    assert found.code == "invalid_value"
    assert message in found.message


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "permissions"),
        (errno.EROFS, "as writable"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOENT, "Restore the folder"),
        (errno.EDQUOT, "Free up space"),
    ],
)
def test_lock_file_that_cannot_be_opened_is_reported_by_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'lorry.db'}")

    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(write_queue.os, "open", fail)

    with pytest.raises(LorryError) as caught, database.write() as session:
        session.execute(text("select 1"))

    monkeypatch.undo()
    database.close()
    assert isinstance(caught.value, OutOfSpace) == (number == errno.EDQUOT)
    assert remedy in caught.value.remedy
