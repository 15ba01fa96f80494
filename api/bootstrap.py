"""The first start: tables, the default project, and one operator's key, made once however often it is called."""

from __future__ import annotations

from dataclasses import dataclass

from catalog import keys, projects
from catalog.db import Database
from catalog.settings import Settings

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
        project = projects.ensure(db)
        made = keys.create_first(db, project_id=project.id, name=FIRST_KEY_NAME, pepper=keys.load_pepper(settings))
    finally:
        db.close()
    return Bootstrapped(created=made is not None, api_key=made)


def sign_in_token(db: Database, *, pepper: bytes, seconds: float) -> str:
    """A one-time token with the rights of the oldest operator's key that is still good."""
    return keys.create_sign_in_link(db, api_key_id=keys.an_operator(db), pepper=pepper, seconds=seconds)
