"""Commits of other sessions between two statements of a transaction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import event

from catalog.db.database import Database


def after_statement(db: Database, fragment: str, act: Callable[[], object]) -> None:
    """Call `act` once, after the next statement that contains `fragment`."""
    waiting = [act]

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if waiting and fragment in statement:
            waiting.pop()()

    event.listen(db.engine, "after_cursor_execute", note)
