"""Fixtures of tests of the database."""

from __future__ import annotations

import pytest
from sqlalchemy import event

from catalog.db.database import Database


@pytest.fixture
def no_endless_wait(db: Database) -> None:
    """Limit lock waits to 20 s. PostgreSQL cannot detect a deadlock that includes a thread of the test itself."""
    event.listen(db.engine, "begin", lambda connection: connection.exec_driver_sql("set local lock_timeout = '20s'"))
