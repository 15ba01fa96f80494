"""The migrations of keys, projects and organizations, up and down with rows in place, on both databases."""

from __future__ import annotations

import pytest
from alembic import command
from alembic.util import CommandError
from sqlalchemy import select

from catalog.db.database import Database, alembic_config
from catalog.tables.tenancy import ApiKey, Organization, Project
from catalog.tenancy import authentication, projects
from catalog.tenancy.scopes import OPERATORS, SCOPES
from tests.catalog.world import PEPPER, Clock, World

BEFORE_SCOPES, BEFORE_LIMITS, BEFORE_ORGANIZATIONS = "0007", "0008", "0029"


def test_keys_of_before_scopes_can_do_what_they_could_and_lesser_ones_end_on_the_way_back(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    world = World(database, Clock())
    project_id = world.caller.project_id
    _, plain = authentication.create(database, project_id=project_id, name="plain", pepper=PEPPER)
    authentication.create(database, project_id=project_id, name="lesser", pepper=PEPPER, scopes=["jobs:read"])
    with database.write() as session:
        session.get_one(Project, world.stranger.project_id).archived_at = 1.0

    command.downgrade(alembic_config(empty_url), BEFORE_SCOPES)
    database.migrate()

    with database.read() as session:
        ended = session.scalars(select(ApiKey.name).where(ApiKey.revoked_at.is_not(None)).order_by(ApiKey.name))
        assert ended.all() == ["key", "lesser"]  # of the archived project, and the one that was to do less
    caller = authentication.authenticate(database, secret=plain, pepper=PEPPER)
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


def test_all_projects_of_before_go_into_one_organization(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    world = World(database, Clock())
    secret = authentication.create(database, project_id=world.caller.project_id, name="key", pepper=PEPPER)[1]
    with database.read() as session:
        before = {row.id: (row.name, row.created_at, row.weight) for row in session.scalars(select(Project))}

    command.downgrade(alembic_config(empty_url), BEFORE_ORGANIZATIONS)
    database.migrate()

    with database.read() as session:
        after = {row.id: (row.name, row.created_at, row.weight) for row in session.scalars(select(Project))}
        (organization,) = session.scalars(select(Organization))
        assert set(session.scalars(select(Project.organization_id))) == {organization.id}
    assert after == before
    assert organization.name == "default"
    assert organization.id.startswith("org-")
    assert organization.created_at == min(created_at for _, created_at, _ in before.values())
    assert authentication.authenticate(database, secret=secret, pepper=PEPPER).organization_id == organization.id
    assert projects.create(database, "new").organization_id == organization.id
    command.check(alembic_config(empty_url))
    database.close()


def test_several_organizations_do_not_become_one_on_the_way_back(empty_url: str) -> None:
    database = Database(empty_url)
    database.migrate()
    away = World(database, Clock()).caller_of("elsewhere", "away")

    with pytest.raises(CommandError, match="There are 2 organizations"):
        command.downgrade(alembic_config(empty_url), BEFORE_ORGANIZATIONS)

    command.check(alembic_config(empty_url))
    with database.read() as session:
        assert session.get_one(Project, away.project_id).organization_id == away.organization_id
    database.close()
