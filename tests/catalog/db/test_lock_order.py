"""Lock order of concurrent transactions on PostgreSQL: every transaction locks rows in the same order.

A fixed order prevents deadlocks. Each test holds one transaction that has locked half of its rows until another
transaction waits behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from catalog import revocation
from catalog.db.database import Database
from catalog.errors import Conflict, Unauthorized
from catalog.history import tracker_runs
from catalog.jobs import commands
from catalog.lifecycle import queue_position
from catalog.lifecycle.queue_position import MoveTarget
from catalog.queue import claims
from catalog.serving import endpoints
from catalog.storage import token_cache
from catalog.storage.manifest import Manifest, show_artifact
from catalog.tables.fleet import Worker
from catalog.tables.jobs import Job
from catalog.tables.serving import ServingEndpoint
from catalog.tables.storage import Artifact, Prepared
from catalog.tenancy import api_keys, authentication
from catalog.tenancy.api_keys import KeyRequest
from tests.catalog.serving.test_endpoints import NEW, registered
from tests.catalog.world import LEASE, PEPPER, World, manifest, sha

pytestmark = [
    pytest.mark.usefixtures("no_endless_wait"),
    pytest.mark.parametrize("database_url", ["postgresql"], indirect=True),
]
MAX_CHECKS = 2_000
CHECK_PAUSE = text("select pg_sleep(0.01)")
"""The pause between two checks. It runs in the database, which leaves the processor to the awaited threads."""


def wait_for_one_in_line(db: Database, *, or_end_of: Future[Any] | None = None) -> None:
    """Wait until another transaction of this database waits for a lock, or until this thread has ended."""
    in_line = text(
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    )
    for look in count():
        with db.engine.connect() as connection:
            connection.exec_driver_sql(
                "set local role none"
            )  # other roles cannot see what the sessions of the owner wait for
            if connection.execute(in_line).scalar() or (or_end_of is not None and or_end_of.done()):
                return
            connection.execute(CHECK_PAUSE)
        assert look < MAX_CHECKS, "no transaction waits for a lock"


def after_the_first_call(function: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
    calls = count()

    def wrapped(*arguments: Any, **given: Any) -> Any:
        result = function(*arguments, **given)
        if next(calls) == 0:
            then()
        return result

    return wrapped


def test_cache_can_be_stored_and_forgotten_concurrently(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = manifest("tokens", kind="tokens")

    def put(artifact: Manifest = tokens) -> None:
        world.put_tokens("key", file_digest=sha("file"), artifact=artifact, report={})

    put()
    with ThreadPoolExecutor(1) as pool:
        forgetting: list[Any] = []

        def forget_meanwhile() -> None:
            forgetting.append(pool.submit(token_cache.forget, world.db, "key"))
            wait_for_one_in_line(world.db)

        monkeypatch.setattr(token_cache, "show_artifact", after_the_first_call(show_artifact, forget_meanwhile))
        put()
        forgetting[0].result()

    # The cache that was stored last is the one that was found damaged: it is either gone or complete.
    with world.db.read() as session:
        row = session.get(Prepared, "key")
        assert (row is None) == (session.get(Artifact, tokens.digest) is None)


def test_cache_replaced_concurrently_is_not_forgotten(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged, sound = manifest("damaged", kind="tokens"), manifest("sound", kind="tokens")
    world.put_tokens("key", file_digest=sha("file"), artifact=damaged, report={})

    def put_sound() -> None:
        world.put_tokens("key", file_digest=sha("file"), artifact=sound, report={})

    meanwhile, serialize = iter([put_sound]), token_cache.serialize

    def serialize_after_a_put(session: Session, name: str) -> None:
        for act in meanwhile:
            act()
        serialize(session, name)

    monkeypatch.setattr(token_cache, "serialize", serialize_after_a_put)
    token_cache.forget(world.db, "key")

    found = token_cache.get(world.db, "key")
    assert found is not None
    assert found.artifact == sound.digest


def test_lease_extension_after_an_outage_does_not_hold_the_worker_row(world: World) -> None:
    world.worker("w1")
    world.worker("w2")
    mine = world.running()
    world.queued()
    (other,) = world.claim("w2")
    world.clock.advance(LEASE)

    with ThreadPoolExecutor(1) as pool:
        with world.db.write() as session:
            lock(session, other.job.id)
            beat = pool.submit(world.beat, mine.claim_id, worker_id="w1")
            wait_for_one_in_line(world.db)

            session.scalar(select(Worker).where(Worker.id == "w1").with_for_update())
        orders = beat.result()

    assert orders == {mine.claim_id: claims.ClaimDirectives()}
    assert world.job(other.job.id).lease_extended


def test_run_that_goes_idle_while_its_job_starts_is_woken(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.worker(integrations=("tensorboard",))
    job = world.queued(integrations=[{"type": "tensorboard"}])
    with world.db.write() as session:
        tracker_runs.wake(session, session.get_one(Job, job.id), now=world.clock())
    (run,) = tracker_runs.claim(world.db, types=["tensorboard"], limit=1)
    news = tracker_runs.poll(world.db, run)

    with ThreadPoolExecutor(1) as pool:
        recording: list[Any] = []

        def record_meanwhile() -> None:
            recording.append(pool.submit(tracker_runs.record, world.db, run, news, run_id="r"))
            wait_for_one_in_line(world.db)

        monkeypatch.setattr(tracker_runs, "wake", after_the_first_call(tracker_runs.wake, record_meanwhile))
        world.claim()
        still_open = recording[0].result()

    assert still_open is not None


def test_job_is_not_moved_next_to_one_that_is_cancelled_meanwhile(world: World) -> None:
    job, neighbor = world.queued(), world.queued()
    given: dict[str, Any] = {**world.of(job.id), "target": MoveTarget(before=neighbor.id)}

    with ThreadPoolExecutor(1) as pool:
        with world.db.write() as session:
            row = session.get_one(Job, neighbor.id, with_for_update=True)
            commands.stop(session, row, commands.CANCEL, now=world.clock())
            moving = pool.submit(queue_position.move_to, world.db, **given)
            wait_for_one_in_line(world.db)

        with pytest.raises(Conflict) as refusal:
            moving.result()

    assert refusal.value.code == "invalid_transition"


def test_endpoint_that_is_deleted_while_keys_are_sealed_is_skipped(world: World) -> None:
    endpoint_id = registered(world, "gone")

    with ThreadPoolExecutor(1) as pool:
        with world.db.write() as session:
            session.delete(session.get_one(ServingEndpoint, endpoint_id, with_for_update=True))
            session.flush()
            sealing = pool.submit(endpoints.seal_all, world.db, peppers=[NEW, PEPPER.current])
            wait_for_one_in_line(world.db)

        assert sealing.result() == 0


def lock(session: Session, job_id: str) -> None:
    assert session.scalar(select(Job.id).where(Job.id == job_id).with_for_update())


def test_key_creation_fails_during_cascading_revocation_of_its_creator(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The creation starts after the descendants were read and before the creator's key is revoked."""
    request = KeyRequest(name="child")
    creator, secret = api_keys.create(world.db, caller=world.caller, request=request, pepper=PEPPER)
    holder = authentication.authenticate(world.db, secret=secret, pepper=PEPPER)
    with ThreadPoolExecutor(1) as pool:
        creating: list[Any] = []

        def create_meanwhile() -> None:
            creating.append(pool.submit(api_keys.create, world.db, caller=holder, request=request, pepper=PEPPER))
            wait_for_one_in_line(world.db)

        read = after_the_first_call(revocation._descendants, create_meanwhile)  # pyright: ignore[reportPrivateUsage]
        monkeypatch.setattr(revocation, "_descendants", read)
        revocation.revoke(world.db, caller=world.caller, api_key_id=creator.id, with_descendants=True)

        with pytest.raises(Unauthorized):
            creating[0].result()
