"""Statements that the databases of one test compiled are there for those of the next, as in a service that runs on.

By itself each engine begins with none, and knows its own by its dialect's identity: a test that has a database of its
own compiles all that it asks.
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
    """Among all databases that this process opens from now on, of each kind."""
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
    """Tests have one server of a kind, and one library."""
    return type(self) is type(other)


def _kind(self: object) -> int:
    return hash(type(self))
