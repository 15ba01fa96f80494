"""Measures of how much a database reads for a statement, independent of the speed of the machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from itertools import count
from typing import Any

from sqlalchemy import event

from catalog.db.database import Database

STEPS_A_ROW = 5
"""The minimum number of steps of SQLite's virtual machine per row."""


def rows_read(db: Database, act: Callable[[], object]) -> int:
    """Return an upper bound of the rows of `jobs` that are read.

    PostgreSQL: the rows that its scans return or discard. SQLite: derived from the steps of its virtual machine.
    """
    with db.engine.begin() as connection:
        connection.exec_driver_sql("analyze jobs")
    if not db.is_sqlite:
        return rows_scanned(db, act)
    steps = count()

    def count_steps(_connection: Any, cursor: Any, *_: Any) -> None:
        cursor.connection.set_progress_handler(lambda: next(steps) and 0, 1)

    event.listen(db.engine, "before_cursor_execute", count_steps)
    act()
    event.remove(db.engine, "before_cursor_execute", count_steps)
    db.engine.dispose()  # closes the connections with their progress handlers
    return next(steps) // STEPS_A_ROW


def rows_scanned(db: Database, act: Callable[[], object]) -> int:
    """Return the rows of `jobs` that PostgreSQL scans, with the statistics that the table has now."""
    statements = statements_of(db, act)
    return sum(_rows_scanned(db, statement, values) for statement, values in statements)


def statements_of(db: Database, act: Callable[[], object]) -> list[tuple[str, Any]]:
    """Return the statements that `act` executes, with their values."""
    statements: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        statements.append((statement, values))

    event.listen(db.engine, "before_cursor_execute", note)
    act()
    event.remove(db.engine, "before_cursor_execute", note)
    return statements


def _rows_scanned(db: Database, statement: str, values: Any) -> int:
    if "FROM jobs" not in statement or not statement.lstrip().startswith(("SELECT", "WITH")):
        return 0
    with db.engine.connect() as connection:
        explained = connection.exec_driver_sql(f"explain (analyze, format json) {statement}", values).scalar_one()
        connection.rollback()
    plan = (explained if isinstance(explained, list) else json.loads(explained))[0]["Plan"]
    return int(sum(_rows_of_scans(plan)))


def _rows_of_scans(node: dict[str, Any]) -> Generator[float]:
    if node.get("Relation Name") == "jobs":
        left_out = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
        yield (node["Actual Rows"] + left_out) * node["Actual Loops"]
    for below in node.get("Plans", ()):
        yield from _rows_of_scans(below)
