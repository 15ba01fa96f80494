"""The tables as an auditor reads them: plain rows, without any logic of the catalog."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, create_engine, select
from sqlalchemy.pool import NullPool

from catalog.tables.table import Table as Tables

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """All rows that are checked, read in one transaction."""

    jobs: list[Row]
    attempts: dict[str, list[Row]]
    """By job, in the order of their numbers."""
    transitions: dict[str, list[Row]]
    """By job, in the order in which they were written."""
    adapters: list[Row]
    artifacts: list[Row]
    checkpoints: list[Row]
    files: list[Row]
    prepared: list[Row]
    idempotency_keys: list[Row]
    endpoints: list[Row]
    deliveries: list[Row]
    tries: list[Row]
    audit_events: list[Row]
    """In the order in which they were written."""
    audit_heads: list[Row]
    workers: list[Row]
    trainers: list[Row]
    tasks: list[Row]


def read(database_url: str) -> Record:
    engine = create_engine(database_url, poolclass=NullPool)
    try:
        with engine.connect().execution_options(isolation_level=_at_one_moment(database_url)) as connection:
            return _read(connection)
    finally:
        engine.dispose()


def _at_one_moment(database_url: str) -> Any:
    return "SERIALIZABLE" if database_url.startswith("sqlite") else "REPEATABLE READ"


def _read(connection: Connection) -> Record:
    return Record(
        jobs=_rows(connection, "jobs"),
        attempts=_by_job(_rows(connection, "attempts", order="number")),
        transitions=_by_job(row for row in _rows(connection, "events", order="seq", type="transition")),
        adapters=_rows(connection, "adapters"),
        artifacts=_rows(connection, "artifacts"),
        checkpoints=_rows(connection, "checkpoints"),
        files=_rows(connection, "files"),
        prepared=_rows(connection, "prepared"),
        idempotency_keys=_rows(connection, "idempotency_keys"),
        endpoints=_rows(connection, "webhook_endpoints"),
        deliveries=_rows(connection, "webhook_deliveries"),
        tries=_rows(connection, "webhook_tries"),
        audit_events=_rows(connection, "audit_events", order="seq"),
        audit_heads=_rows(connection, "audit_head"),
        workers=_rows(connection, "workers"),
        trainers=_rows(connection, "trainers"),
        tasks=_rows(connection, "tasks"),
    )


def _rows(connection: Connection, name: str, *, order: str | None = None, **equal: str) -> list[Row]:
    table: Table = Tables.metadata.tables[name]
    wanted = select(table).where(*(table.c[column] == value for column, value in equal.items()))
    found = connection.execute(wanted.order_by(table.c[order]) if order else wanted)
    return [row._asdict() for row in found]


def _by_job(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["job_id"]].append(row)
    return found
