"""The migrations of keys and projects, up and down with rows in place, on both databases."""

from __future__ import annotations

from alembic import command
from sqlalchemy import select

from catalog import keys
from catalog.db import Database, alembic_config
from catalog.scopes import OPERATORS, SCOPES
from catalog.tables import ApiKey, Project
from tests.catalog.world import PEPPER, Clock, World

BEFORE_SCOPES, BEFORE_LIMITS = "0007", "0008"


def test_keys_of_before_scopes_can_do_what_they_could_and_lesser_ones_end_on_the_way_back(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    world = World(database, Clock())
    project_id = world.caller.project_id
    _, plain = keys.create(database, project_id=project_id, name="plain", pepper=PEPPER)
    keys.create(database, project_id=project_id, name="lesser", pepper=PEPPER, scopes=["jobs:read"])
    with database.write() as session:
        session.get_one(Project, world.stranger.project_id).archived_at = 1.0

    command.downgrade(alembic_config(empty_url), BEFORE_SCOPES)
    database.migrate()

    with database.read() as session:
        ended = session.scalars(select(ApiKey.name).where(ApiKey.revoked_at.is_not(None)).order_by(ApiKey.name))
        assert ended.all() == ["key", "lesser"]  # of the archived project, and the one that was to do less
    caller = keys.authenticate(database, secret=plain, pepper=PEPPER)
    assert caller.scopes == frozenset(SCOPES) - OPERATORS
    assert not caller.is_limited
    command.check(alembic_config(empty_url))
    database.close()


def test_limits_of_keys_come_and_go_and_the_keys_stay(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    key_id = World(database, Clock()).caller.api_key_id
    with database.write() as session:
        session.get_one(ApiKey, key_id).jobs_per_day = 5

    command.downgrade(alembic_config(empty_url), BEFORE_LIMITS)
    database.migrate()

    with database.read() as session:
        kept = session.get_one(ApiKey, key_id)
        assert (kept.jobs_per_day, kept.requests_per_minute, kept.revoked_at) == (None, None, None)
    command.check(alembic_config(empty_url))
    database.close()
