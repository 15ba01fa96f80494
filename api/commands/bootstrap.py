"""The first start: creates the bucket, the tables, a project and one operator key. Repeated calls create nothing
twice."""

from __future__ import annotations

import logging
import stat
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, inspect, make_url

from catalog import disk, pepper
from catalog.db.database import Database
from catalog.disk import full_disk_named
from catalog.errors import InvalidRequest
from catalog.fleet import compatibility
from catalog.maintenance.backup import integrity
from catalog.pepper import Pepper
from catalog.settings import Settings
from catalog.storage.object_storage import create_missing_bucket
from catalog.tables.tenancy import ApiKey
from catalog.tenancy import authentication, projects

log = logging.getLogger(__name__)
FIRST_KEY_NAME = "first operator key"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bootstrapped:
    created: bool
    """Whether this call created the key."""
    api_key: str | None
    pepper: Pepper


def bootstrap(settings: Settings) -> Bootstrapped:
    """Create the bucket, and create or migrate the database. Safe to repeat and to run concurrently: only one call gets
    the key."""
    with full_disk_named():
        disk.make_folder(settings.data_dir, mode=0o700)
    warn_if_readable(settings.data_dir)
    create_missing_bucket(settings.resolved_store_url())
    db = Database(settings.resolved_database_url())
    try:
        db.migrate()
        compatibility.announce(db)
        project = projects.first(db)
        loaded = pepper.load(settings, db)
        made = authentication.create_first(db, project_id=project.id, name=FIRST_KEY_NAME, pepper=loaded)
    finally:
        db.close()
    return Bootstrapped(created=made is not None, api_key=made, pepper=loaded)


def warn_if_readable(folder: Path) -> None:
    """Log a warning where users other than the owner and its group can read the data folder."""
    if folder.is_dir() and (mode := stat.S_IMODE(folder.stat().st_mode)) & 0o007:
        log.warning(
            "Other users of this machine can read the data folder %s (mode %o). If they must not, run: "
            "chmod -R go-rwx %s",
            folder,
            mode,
            folder,
        )


def open_existing(settings: Settings, *, if_older: str = "database_too_old") -> Database:
    """Open the existing database, and create none.

    Raises InvalidRequest if there is no database, and Conflict if it is damaged or its tables are older than this code;
    `if_older` names the text of the latter.
    """
    url = make_url(settings.resolved_database_url())
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise _missing_database(settings, url)
    db = Database(settings.resolved_database_url())
    with integrity.damage_refused(url), db.read() as session:
        if not inspect(session.connection()).has_table(ApiKey.__tablename__):
            raise _missing_database(settings, url)
        compatibility.check_tables(session, if_older=if_older)
    return db


def _missing_database(settings: Settings, url: URL) -> InvalidRequest:
    return InvalidRequest(
        "no_database_in_data_dir" if settings.database_url is None else "no_database_at_url", url=url.render_as_string()
    )


def sign_in_token(settings: Settings, db: Database, *, seconds: float) -> str:
    """Return a one-time token with the rights of the oldest valid operator key."""
    secret = pepper.load(settings, db)
    return authentication.create_sign_in_link(
        db, api_key_id=authentication.an_operator(db), pepper=secret, seconds=seconds
    )


def sign_in_url(address: str, token: str) -> str:
    """Return the URL of the dashboard's page that shows what the token signs in to, and signs in on confirmation.

    The token is in the fragment, which browsers send to no server. So it appears in no proxy log, and a program that
    opens the link to check it does not use up the token.
    """
    return f"{address.rstrip('/')}/dashboard/#/sign-in/{token}"
