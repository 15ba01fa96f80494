"""A stolen worker password grants little: PostgreSQL rejects everything that a worker does not need."""

from __future__ import annotations

import secrets

import psycopg
import pytest
from sqlalchemy import make_url, text

from catalog.audit import chain
from catalog.db.database import Database
from catalog.errors import Unavailable
from catalog.storage import files
from catalog.tables import privileges
from catalog.tables.privileges import API_ROLE, WORKER_ROLE
from catalog.tables.table import Table
from catalog.tenancy import authentication, projects
from tests.catalog.world import PEPPER, World
from tests.services.postgres import as_role

ATTACKS = {
    "make a key an operator key": "update api_keys set is_operator = true",
    "read the keys' hashes": "select digest from api_keys",
    "make a key": "insert into api_keys (id, project_id, name, digest, is_operator, created_at)"
    " values ('key-x', 'p', 'x', 'x', true, 0)",
    "sign a browser in": "update sign_ins set browser_digest = 'x'",
    "read browser sessions": "select * from sign_ins",
    "read the keys of replaced peppers": "select sealed from retired_keys",
    "add a key of a replaced pepper": "insert into retired_keys (id, sealed) values ('x', 'x')",
    "read webhook salts": "select salt from webhook_endpoints",
    "redirect webhooks": "update webhook_endpoints set url = 'https://evil.example'",
    "delete audit events": "delete from audit_events",
    "empty the audit log": "truncate audit_events",
    "change an audit event": "update audit_events set actor_name = 'another actor'",
    "read the audit log": "select details from audit_events",
    "seal a forged event": "insert into audit_events (id, type, effective_at, actor_type, details, link, digest)"
    " values ('audit-x', 'project.created', 0, 'server', '{}', 1, 'x')",
    "set back the chain's head": "update audit_head set link = 0",
    "raise the limits": "update projects set max_device_hours_per_month = null, weight = 100",
    "move a job to another project": "update jobs set project_id = 'p'",
    "submit a job": "insert into jobs (id) values ('ftjob-x')",
    "raise a job's priority": "update jobs set priority = 0",
    "train a job on other tokens": "update jobs set train_prepared = 'k'",
    "share a model": "insert into model_permissions (id, model_id, project_id, created_at, created_by)"
    " values ('x', 'x', 'x', 0, 'x')",
    "delete a job's events": "delete from events",
    "delete an adapter": "update adapters set deleted_at = 0",
    "change the accepted workers": "update service set oldest_protocol = 0",
    "drop a table": "drop table jobs",
    "make a table": "create table of_mine (x int)",
    "make a function that others call": "create function lower(text) returns text language sql as 'select 1::text'",
}
OF_A_RUNNING_SERVICE = ("delete audit events", "empty the audit log", "change an audit event", "drop a table")


@pytest.fixture
def postgresql(world: World) -> World:
    if world.db.is_sqlite:
        pytest.skip("SQLite has no roles.")
    authentication.create(world.db, project_id=world.caller.project_id, name="mine", pepper=PEPPER)
    chain.seal(world.db, pepper=PEPPER.current)
    return world


def refused(world: World, role: str, statement: str) -> str | None:
    """Run the statement as the role. Returns the name of the error, or None."""
    url = make_url(as_role(world.db.url, role)).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection:
        try:
            connection.execute(statement.encode())
        except psycopg.Error as error:
            return type(error).__name__
        finally:
            connection.rollback()
    return None


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("attack", ATTACKS)
def test_worker_password_does_not_allow(postgresql: World, attack: str) -> None:
    assert refused(postgresql, WORKER_ROLE, ATTACKS[attack]) == "InsufficientPrivilege"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("attack", OF_A_RUNNING_SERVICE)
def test_api_server_password_does_not_allow(postgresql: World, attack: str) -> None:
    assert refused(postgresql, API_ROLE, ATTACKS[attack]) == "InsufficientPrivilege"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_manual_grants_are_revoked_by_the_next_migration(postgresql: World) -> None:
    with postgresql.db.engine.begin() as connection:
        connection.execute(text(f"grant all on api_keys to {WORKER_ROLE}"))
        connection.execute(text(f"grant select (salt) on webhook_endpoints to {WORKER_ROLE}"))
    assert refused(postgresql, WORKER_ROLE, ATTACKS["read the keys' hashes"]) is None

    postgresql.db.migrate()

    assert refused(postgresql, WORKER_ROLE, ATTACKS["read the keys' hashes"]) == "InsufficientPrivilege"
    assert refused(postgresql, WORKER_ROLE, ATTACKS["read webhook salts"]) == "InsufficientPrivilege"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_process_with_the_wrong_role_gets_a_clear_error(postgresql: World) -> None:
    as_worker = Database(as_role(postgresql.db.url, WORKER_ROLE))

    with pytest.raises(Unavailable) as refusal:
        projects.create(as_worker, "new")

    as_worker.close()
    assert refusal.value.code == "database_permission_denied"
    assert "permission denied for table " in refusal.value.message
    assert "LORRY_DATABASE_URL" in refusal.value.sentence()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_worker_finds_the_file_of_a_job_for_its_lineage_record(postgresql: World) -> None:
    file_id = postgresql.file()
    as_worker = Database(as_role(postgresql.db.url, WORKER_ROLE))

    found = files.get(as_worker, project_id=postgresql.caller.project_id, file_id=file_id)

    as_worker.close()
    assert found.id == file_id


def test_rights_cover_every_table_and_name_existing_columns() -> None:
    tables = {table.name: set(table.columns.keys()) for table in Table.metadata.sorted_tables}

    assert set(privileges.WORKER_RIGHTS) == set(tables)
    assert set(privileges.API_RESTRICTED) <= set(tables)
    for role in (API_ROLE, WORKER_ROLE):
        for table, rights in privileges.rights(role).items():
            for columns in (rights.select, rights.insert, rights.update):
                assert columns in (True, False) or set(columns) <= tables[table], table


def test_workers_read_whole_rows_except_of_webhook_endpoints() -> None:
    parts = {name: given.select for name, given in privileges.WORKER_RIGHTS.items() if isinstance(given.select, tuple)}

    assert set(parts) == {"webhook_endpoints"}


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_migration_ignores_tables_of_another_owner(postgresql: World) -> None:
    """The owner of Lorry's tables migrates without rights on the other owner's table."""
    owner = f"owner_{secrets.token_hex(4)}"
    with postgresql.db.engine.begin() as connection:
        connection.execute(text("create table public.of_another (x int)"))
        connection.execute(text(f"grant select on public.of_another to {WORKER_ROLE}"))
        connection.execute(text(f"create role {owner} login"))
        for table in [*Table.metadata.tables, "alembic_version"]:
            connection.execute(text(f"alter table {table} owner to {owner}"))
        connection.execute(text(f"grant usage, create on schema public to {owner} with grant option"))
    try:
        with postgresql.db.engine.begin() as connection:
            connection.execute(text(f"set local role {owner}"))
            privileges.apply(connection)
        assert refused(postgresql, WORKER_ROLE, "select * from of_another") is None
        assert refused(postgresql, WORKER_ROLE, ATTACKS["read the keys' hashes"]) == "InsufficientPrivilege"
    finally:
        with postgresql.db.engine.begin() as connection:
            connection.execute(text("drop table public.of_another"))
            connection.execute(text(f"reassign owned by {owner} to current_user"))
            connection.execute(text(f"drop owned by {owner}"))
            connection.execute(text(f"drop role {owner}"))
