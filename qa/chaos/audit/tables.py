"""The tables as an auditor reads them: plain rows, without any logic of the catalog."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import create_engine, select
from sqlalchemy.pool import NullPool

from catalog.tables.table import Table

Row = Mapping[str, Any]
Tables = Mapping[str, list[Row]]
"""The rows of each table that is checked."""
ORDERS: dict[str, str | None] = {
    **dict.fromkeys(("jobs", "adapters", "artifacts", "checkpoints", "files", "prepared", "idempotency_keys")),
    **dict.fromkeys(("webhook_endpoints", "webhook_deliveries", "webhook_tries")),
    **dict.fromkeys(("audit_head", "workers", "trainers", "tasks")),
    "attempts": "number",
    "events": "seq",
    "audit_events": "seq",
}
"""The tables that are read, with the column that orders their rows."""


def read(database_url: str) -> dict[str, list[Row]]:
    """Read all tables at one moment."""
    level: Any = "SERIALIZABLE" if database_url.startswith("sqlite") else "REPEATABLE READ"
    engine = create_engine(database_url, poolclass=NullPool)
    found: dict[str, list[Row]] = {}
    try:
        with engine.connect().execution_options(isolation_level=level) as connection:
            for name, order in ORDERS.items():
                table = Table.metadata.tables[name]
                wanted = select(table) if order is None else select(table).order_by(table.c[order])
                found[name] = [row._asdict() for row in connection.execute(wanted)]
    finally:
        engine.dispose()
    return found


def by_job(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["job_id"]].append(row)
    return found
