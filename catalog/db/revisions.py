"""Schema revisions: the migration scripts, the revisions that they know, and the one that a database has.

A revision is named after its file, such as `0001_first_release`. A name that no script has belongs to a later version,
unless a build before the first release used it: their databases cannot be upgraded.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, column, inspect, select, table
from sqlalchemy.orm import Session

from catalog.errors import Conflict

SCRIPTS = Path(__file__).parents[2] / "migrations"
"""Every function reads it when it is called: a test can put scripts of its own in its place."""
VERSIONS = table("alembic_version", column("version_num"))
UNRELEASED = re.compile(r"\d{4}|0001_initial")
"""Revisions of builds before the first release. Add the newest one if its script is edited before that."""
TOO_NEW = "Run this command with the version of Lorry that migrated the database, or with a later one."
NOT_UPGRADABLE = (
    "Keep it for the build that made it. For this version, make a new database: name an empty one by "
    "LORRY_DATABASE_URL and an empty folder by LORRY_DATA_DIR, then run: python -m api bootstrap."
)


def alembic_config(url: str) -> Config:
    """Alembic's configuration for `url`."""
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def known() -> tuple[str, ...]:
    """All revisions of this code, oldest first."""
    return _known(SCRIPTS)


def newest() -> str:
    return known()[-1]


def read(session: Session | Connection) -> str | None:
    """The database's."""
    return session.scalar(select(VERSIONS.c.version_num))


def is_older(revision: str | None) -> bool:
    """Whether a migration of this code leads from it to the newest."""
    return revision is None or revision in known()[:-1]


def is_unreleased(revision: str | None) -> bool:
    """Whether a build before the first release made the tables."""
    return revision is not None and UNRELEASED.fullmatch(revision) is not None


def check_known(connection: Connection) -> None:
    """Before a migration. Raises Conflict where no script leads from the database's revision to this code's."""
    if not inspect(connection).has_table(VERSIONS.name):
        return
    theirs = read(connection)
    if is_unreleased(theirs):
        raise not_upgradable(theirs)
    if theirs is not None and theirs not in known():
        raise Conflict(
            f"The database is at revision {theirs}, of a later version of Lorry than this one.",
            code="database_too_new",
            remedy=TOO_NEW,
        )


def not_upgradable(theirs: str | None) -> Conflict:
    return Conflict(
        f"The database is at revision {theirs}, of a build before the first release: it cannot be upgraded.",
        code="database_not_upgradable",
        remedy=NOT_UPGRADABLE,
    )


@cache
def _known(scripts: Path) -> tuple[str, ...]:
    return tuple(script.revision for script in ScriptDirectory(str(scripts)).walk_revisions())[::-1]
