"""The service accepts workers at the revision of its database and with a protocol in the announced range."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from pydantic import BaseModel
from sqlalchemy import delete, insert

from catalog.db import revisions
from catalog.db.database import Database
from catalog.errors import Conflict, Unavailable, UnfitWorker
from catalog.fleet import compatibility, cordons, workers
from catalog.queue import claims
from catalog.spec.job import JobSpec
from catalog.states import EndReason, JobState
from catalog.tables.fleet import Worker
from tests.catalog.world import World
from tests.next_migration import LATER, NEXT, UNRELEASED

JOB_SPECS = {4: "c542c9f914e96f16d2628214b6f4d070202721dfb4902f23cecd0f028f80a520"}
"""Digest of the fields of a JobSpec by protocol."""
OLDER = revisions.newest()
"""The previous revision once the migration of tests/next_migration.py is installed."""


@pytest.fixture
def restored(world: World) -> Iterator[World]:
    """Restore the revision afterwards, because a later test may use the same database."""
    with world.db.read() as session:
        revision = revisions.read(session) or ""
    yield world
    at_revision(world, revision)


def at_revision(world: World, revision: str) -> None:
    with world.db.write() as session:
        session.execute(delete(revisions.VERSIONS))  # a test may have deleted the row
        session.execute(insert(revisions.VERSIONS).values(version_num=revision))


def announced(world: World, oldest: int, newest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Announce a service whose code supports these protocols."""
    with monkeypatch.context() as patch:
        patch.setattr(compatibility, "OLDEST_PROTOCOL", oldest)
        patch.setattr(compatibility, "PROTOCOL", newest)
        patch.setattr(compatibility, "lorry_version", lambda: "9.9.9")
        compatibility.announce(world.db)


def register(world: World, worker_id: str, protocol: int | None = None) -> None:
    about = {"host": "here", "pid": 1, "devices": [{"kind": "cpu"}], "version": "1", "memory_bytes": 10**12}
    workers.register_worker(world.db, worker_id=worker_id, protocol=protocol, **about)  # pyright: ignore[reportArgumentType]


def beat(world: World, worker_id: str) -> bool:
    """Return whether the heartbeat asks the worker to drain."""
    return workers.worker_beat(world.db, worker_id, resident_base=None, trainer_id=None, report=None).drain


@pytest.mark.parametrize(
    ("revision", "code", "remedy"),
    [
        (OLDER, "database_incompatible", "Run `python -m api bootstrap` from this version"),
        (LATER, "worker_incompatible", "Install the service's version"),
        (UNRELEASED, "database_incompatible", "to an empty database"),
    ],
)
def test_worker_at_another_revision_is_rejected_with_a_remedy(
    restored: World, next_migration: Path, revision: str, code: str, remedy: str
) -> None:
    world = restored
    at_revision(world, revision)

    with pytest.raises(UnfitWorker) as refused:
        register(world, "w1")

    assert refused.value.code == code
    assert f" {revision}" in refused.value.message
    assert remedy in refused.value.remedy
    with pytest.raises(UnfitWorker):
        compatibility.check(world.db)
    at_revision(world, NEXT)
    compatibility.check(world.db)
    with world.db.read() as session:
        assert session.get(Worker, "w1") is None


def test_worker_at_an_older_revision_learns_the_version_to_install(
    restored: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced(restored, 1, 1, monkeypatch)
    at_revision(restored, LATER)

    with pytest.raises(UnfitWorker) as refused:
        compatibility.check(restored.db)

    assert refused.value.remedy == "Install Lorry 9.9.9 on this node, then restart the worker."


def test_database_without_a_revision_is_too_old(restored: World) -> None:
    with restored.db.write() as session:
        session.execute(delete(revisions.VERSIONS))

    with pytest.raises(UnfitWorker, match="but the database is at revision none"):
        compatibility.check(restored.db)


@pytest.mark.parametrize(
    ("protocol", "code", "remedy"),
    [(3, "worker_incompatible", "Install Lorry "), (6, "worker_incompatible", "Upgrade the service first")],
)
def test_worker_outside_the_protocol_range_is_rejected_with_a_remedy(
    world: World, monkeypatch: pytest.MonkeyPatch, protocol: int, code: str, remedy: str
) -> None:
    announced(world, 4, 5, monkeypatch)

    with pytest.raises(UnfitWorker, match="supports protocols 4 to 5") as refused:
        register(world, "w1", protocol)

    assert (refused.value.code, remedy in refused.value.remedy) == (code, True)
    assert "Lorry 9.9.9" in refused.value.message
    register(world, "w4", 4)
    register(world, "w5", 5)


def test_worker_of_this_code_is_accepted_without_an_announcement(world: World) -> None:
    compatibility.check(world.db)
    register(world, "w1")

    with pytest.raises(UnfitWorker):
        register(world, "w2", compatibility.PROTOCOL + 1)


def field_paths(model: type[BaseModel]) -> list[str]:
    """Return `Model.field` for each field of the model and of the models in it."""
    schema = model.model_json_schema()
    parts = {model.__name__: schema, **schema.get("$defs", {})}
    return sorted(f"{name}.{field}" for name, part in parts.items() for field in part.get("properties", {}))


def test_changed_fields_of_a_job_spec_change_the_protocol() -> None:
    """A worker rejects a spec with unknown fields. So a service whose specs have other fields must not accept it."""
    fields = sha256("\n".join(field_paths(JobSpec)).encode()).hexdigest()

    assert "JobSpec.slice_tokens" in field_paths(JobSpec)
    assert JOB_SPECS.get(compatibility.PROTOCOL) == fields, "Increment PROTOCOL and OLDEST_PROTOCOL, then add a row."


def test_service_drains_workers_that_reject_its_job_specs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    announced(world, 1, 1, monkeypatch)
    register(world, "old", 1)
    world.queued(seed=1)

    compatibility.announce(world.db)

    assert beat(world, "old")
    assert world.claim("old") == []


@pytest.mark.parametrize(
    ("revision", "remedy"), [(OLDER, "python -m api bootstrap"), (UNRELEASED, "to an empty database")]
)
def test_service_accepts_newer_tables_and_rejects_older_ones(
    restored: World, next_migration: Path, revision: str, remedy: str
) -> None:
    world = restored
    for newer in (LATER, NEXT):
        at_revision(world, newer)
        with world.db.read() as session:
            compatibility.check_tables(session)
    at_revision(world, revision)

    with pytest.raises(Conflict, match=f"revision {revision}") as refused, world.db.read() as session:
        compatibility.check_tables(session)

    assert refused.value.code == "database_incompatible"
    assert remedy in refused.value.remedy


def test_every_revision_except_the_newest_is_older(next_migration: Path) -> None:
    assert [revision for revision in revisions.known() if not revisions.is_older(revision)] == [NEXT]
    assert revisions.is_older(None)
    assert not revisions.is_older(LATER)


def test_database_without_tables_is_unavailable(empty_url: str) -> None:
    database = Database(empty_url)

    with pytest.raises(Unavailable, match="lacks Lorry's table alembic_version"):
        compatibility.check(database)
    database.close()


def test_workers_are_upgraded_one_by_one_while_jobs_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old workers use protocol 1. The service is upgraded first and supports both protocols for a while."""
    announced(world, 1, 1, monkeypatch)
    register(world, "old", 1)
    world.queued(seed=1)
    (claim,) = world.claim("old", trainer_id="trainer-old")

    announced(world, 1, 2, monkeypatch)
    register(world, "new", 2)
    world.queued(seed=2)
    assert not beat(world, "old")
    assert not beat(world, "new")
    assert len(world.claim("new")) == 1
    assert not world.beat(claim.claim_id, worker_id="old")[claim.claim_id].stale

    announced(world, 2, 2, monkeypatch)
    assert beat(world, "old")
    assert not beat(world, "new")
    assert world.claim("old") == []
    claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="The worker left.")
    workers.end_worker(world.db, "old")
    (again,) = [one for one in world.claim("new", trainer_id="t") if one.job.id == claim.job.id]
    world.complete(again.claim_id)

    job = world.job(claim.job.id)
    assert (job.state, job.counted_attempts) == (JobState.SUCCEEDED, 0)
    messages = [event.message for event in world.events(job.id)]
    assert any("Worker old is too old for Lorry 9.9.9" in message for message in messages)
    with pytest.raises(UnfitWorker):
        register(world, "old again", 1)
    register(world, "its successor", 2)
    with world.db.read() as session:
        assert session.get_one(Worker, "its successor").cordon is None
    assert cordons.OF_A_DRAIN not in str(messages)
