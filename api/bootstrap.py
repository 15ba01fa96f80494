"""The first start: tables, a project, and one operator's key, made once however often it is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, inspect, make_url
from sqlalchemy.exc import DatabaseError

from catalog import fitness, keys, needs, projects
from catalog.backup import integrity
from catalog.db import Database
from catalog.errors import InvalidRequest
from catalog.settings import Settings
from catalog.tables import ApiKey

COMMAND = "python -m api bootstrap"
FIRST_KEY_NAME = "first operator key"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bootstrapped:
    created: bool
    """The key was made now."""
    api_key: str | None


def bootstrap(settings: Settings) -> Bootstrapped:
    """Safe to call again, and from several processes at once: one of them gets the key."""
    db = Database(settings.resolved_database_url())
    try:
        db.migrate()
        fitness.announce(db)
        needs.note_all(db)
        project = projects.first(db)
        made = keys.create_first(db, project_id=project.id, name=FIRST_KEY_NAME, pepper=keys.load_pepper(settings))
    finally:
        db.close()
    return Bootstrapped(created=made is not None, api_key=made)


def open_existing(settings: Settings, *, if_older: str = fitness.MIGRATE) -> Database:
    """The existing database; none is created. Raises InvalidRequest where there is none, and Conflict where it is
    damaged or where its tables are older than this code, with the remedy `if_older`."""
    url = make_url(settings.resolved_database_url())
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise _nothing_there(url)
    db = Database(settings.resolved_database_url())
    try:
        with db.read() as session:
            if not inspect(session.connection()).has_table(ApiKey.__tablename__):
                raise _nothing_there(url)
            fitness.check_tables(session, remedy=if_older)
    except DatabaseError as error:
        if not integrity.means_damage(error):
            raise
        raise integrity.refusal(str(error.orig)) from error
    return db


def _nothing_there(url: URL) -> InvalidRequest:
    return InvalidRequest(
        f"There is no Lorry at {url.render_as_string()}.",
        code="database_not_set_up",
        remedy=f"Name the data folder of the one you mean by LORRY_DATA_DIR, or make it here: {COMMAND}.",
    )


def sign_in_token(db: Database, *, pepper: bytes, seconds: float) -> str:
    """A one-time token with the rights of the oldest operator's key that is still good."""
    return keys.create_sign_in_link(db, api_key_id=keys.an_operator(db), pepper=pepper, seconds=seconds)
