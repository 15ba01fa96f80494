"""Alembic environment. It uses the connection of catalog.db.database, or the settings' database if run manually."""

from __future__ import annotations

from typing import Any

from alembic import context
from sqlalchemy import Connection

from catalog.db.database import Database
from catalog.settings import Settings
from catalog.tables import privileges
from catalog.tables.table import Table


def _configured_url() -> str:
    return context.config.get_main_option("sqlalchemy.url") or Settings().resolved_database_url()


def _configure(**place: Any) -> None:
    context.configure(
        target_metadata=Table.metadata,
        render_as_batch=True,  # most schema changes in SQLite recreate the table
        compare_type=True,
        compare_server_default=True,
        transaction_per_migration=False,
        **place,
    )


def _run(connection: Connection) -> None:
    _configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
        if context.get_context().get_current_revision() == context.script.get_current_head():
            privileges.apply(connection)  # needs every table of this version to exist


def run() -> None:
    """Offline: print the SQL. Online: migrate the tables in one transaction."""
    if context.is_offline_mode():
        _configure(url=_configured_url(), literal_binds=True, dialect_opts={"paramstyle": "named"})
        with context.begin_transaction():
            context.run_migrations()
        return
    given: Connection | None = context.config.attributes.get("connection")
    if given is not None:
        _run(given)
        return
    db = Database(_configured_url())
    try:
        with db.schema_connection() as connection:
            _run(connection)
    finally:
        db.close()


run()
