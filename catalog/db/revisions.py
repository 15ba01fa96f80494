"""Compares a database's schema revision with the migration scripts.

A revision is named after its file, such as `0001_tables`. An unknown revision belongs to a later version,
unless a build before the first release used it: the databases of such builds cannot be upgraded.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, column, inspect, select, table
from sqlalchemy.orm import Session

from catalog.errors import Conflict

SCRIPTS = Path(__file__).parents[2] / "migrations"
"""Functions read this at call time, so that tests can replace it with their own scripts."""
VERSIONS = table("alembic_version", column("version_num"))
UNRELEASED = re.compile(
    r"\d{4}|0001_(initial|first_release|initial_schema|first_schema)|0002_inference|0003_batches|0004_reproduction"
    r"|0005_serving|0006_adapter_exports|0007_deployment_errors|0008_export_estimates|0009_export_refusals"
)
"""Revisions of builds before the first release. If the newest script is edited before the release, add its revision."""


def alembic_config(url: str) -> Config:
    """Return Alembic's configuration for `url`."""
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def known() -> tuple[str, ...]:
    """Return all revisions of this code, oldest first."""
    return _known(SCRIPTS)


def newest() -> str:
    return known()[-1]


def read(session: Session | Connection) -> str | None:
    """Return the revision of the database; None if it has none."""
    return session.scalar(select(VERSIONS.c.version_num))


def is_older(revision: str | None) -> bool:
    """Return whether this code can migrate the revision to the newest one."""
    return revision is None or revision in known()[:-1]


def is_unreleased(revision: str | None) -> bool:
    """Return whether a build before the first release created the tables."""
    return revision is not None and UNRELEASED.fullmatch(revision) is not None


def upgrade(connection: Connection, url: str, revision: str) -> None:
    """Migrate the tables of the database at `url` to `revision`, in the transaction of `connection`.

    Raises Conflict if no script leads from the database's revision to this code's.
    """
    _check_known(connection)
    config = alembic_config(url)
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _check_known(connection: Connection) -> None:
    if not inspect(connection).has_table(VERSIONS.name):
        return
    database_revision, supported = read(connection), newest()
    if is_unreleased(database_revision):
        raise not_upgradable(database_revision)
    if database_revision is not None and database_revision not in known():
        raise Conflict("database_too_new", database_revision=database_revision, supported=supported)


def not_upgradable(database_revision: str | None) -> Conflict:
    return Conflict("database_not_upgradable", database_revision=str(database_revision))


@cache
def _known(scripts: Path) -> tuple[str, ...]:
    return tuple(script.revision for script in ScriptDirectory(str(scripts)).walk_revisions())[::-1]
