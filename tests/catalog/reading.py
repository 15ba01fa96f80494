"""How much a database reads for what is asked of it: a number that does not depend on how fast the machine is."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from itertools import count
from typing import Any

from sqlalchemy import event

from catalog.db.database import Database

STEPS_A_ROW = 5
"""Of SQLite's machine, at the least."""


def rows_read(db: Database, act: Callable[[], object]) -> int:
    """Of jobs, at most. PostgreSQL: those that its scans give or leave out. SQLite: as many as its steps allow."""
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
    db.engine.dispose()  # with its handlers
    return next(steps) // STEPS_A_ROW


def rows_scanned(db: Database, act: Callable[[], object]) -> int:
    """The same on PostgreSQL, by what it knows of the table as it is."""
    asked = statements_of(db, act)
    return sum(_rows_scanned(db, statement, values) for statement, values in asked)


def statements_of(db: Database, act: Callable[[], object]) -> list[tuple[str, Any]]:
    """What is asked meanwhile, with its values."""
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        asked.append((statement, values))

    event.listen(db.engine, "before_cursor_execute", note)
    act()
    event.remove(db.engine, "before_cursor_execute", note)
    return asked


def _rows_scanned(db: Database, statement: str, values: Any) -> int:
    if "FROM jobs" not in statement or not statement.lstrip().startswith(("SELECT", "WITH")):
        return 0
    with db.engine.connect() as connection:
        told = connection.exec_driver_sql(f"explain (analyze, format json) {statement}", values).scalar_one()
        connection.rollback()
    plan = (told if isinstance(told, list) else json.loads(told))[0]["Plan"]
    return int(sum(_rows_of_scans(plan)))


def _rows_of_scans(node: dict[str, Any]) -> Generator[float]:
    if node.get("Relation Name") == "jobs":
        left_out = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
        yield (node["Actual Rows"] + left_out) * node["Actual Loops"]
    for below in node.get("Plans", ()):
        yield from _rows_of_scans(below)
