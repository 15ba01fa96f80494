"""Share compiled statements between the databases of all tests, as in a service that keeps running.

By default each engine starts with an empty cache and compares dialects by identity, so a test with a database of its
own would compile all its statements.
"""

from __future__ import annotations

from sqlalchemy import Engine
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.util import LRUCache

from catalog.db import database
from tests.services import roles

KEPT = 2000


def share() -> None:
    """Share compiled statements among all databases of one kind that this process opens from now on."""
    for dialect in (SQLiteDialect_pysqlite, PGDialect_psycopg):
        dialect.__eq__ = _is_alike
        dialect.__hash__ = _kind
    compiled, make = LRUCache(KEPT), database._engine

    def engine(url: str) -> Engine:
        made = make(url)
        made.update_execution_options(compiled_cache=compiled)
        roles.assume(made)
        return made

    database._engine = engine


def _is_alike(self: object, other: object) -> bool:
    """All dialects of a kind are alike, because tests use one server version and one library of each."""
    return type(self) is type(other)


def _kind(self: object) -> int:
    return hash(type(self))
