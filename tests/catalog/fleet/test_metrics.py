"""Fleet metrics equal the counts computed from the tables. test_query_plans.py covers the cost of reading them."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import select

from catalog.db.database import Database
from catalog.fleet import metrics, workers
from catalog.fleet.metrics import Numbers
from catalog.jobs import commands
from catalog.lifecycle import queue_position, recovery
from catalog.queue import claims
from catalog.registry import adapters
from catalog.states import EndReason, JobState, PriorityClass
from catalog.tables.jobs import Job
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint
from catalog.usage import ledger
from tests.catalog.world import LEASE, World, begin_preparation


def read(world: World) -> Numbers:
    return metrics.read(world.db)


def counted(world: World) -> dict[tuple[str, int], int]:
    """Count the jobs by state and class, one by one."""
    with world.db.read() as session:
        rows = session.execute(select(Job.state, Job.priority)).all()
    return dict(Counter((row[0], row[1]) for row in rows))


def kept(world: World) -> dict[tuple[str, int], int]:
    return {(state.value, int(each)): number for (state, each), number in read(world).jobs.items() if number}


def test_stored_counters_equal_counts_after_every_transition(world: World) -> None:
    world.worker()
    finished, failing, released = world.running(), world.running(priority="urgent"), world.running(priority="batch")
    adapter = world.complete(finished.claim_id)
    claims.end(world.db, failing.claim_id, reason=EndReason.USER_ERROR, detail="no")
    claims.end(world.db, released.claim_id, reason=EndReason.DRAINED, detail="left")
    paused, cancelled = world.submit(priority="urgent"), world.submit()
    commands.pause(world.db, **world.of(paused.id))
    commands.cancel(world.db, **world.of(cancelled.id))
    world.submit(priority="batch")

    found = read(world)

    assert kept(world) == counted(world)
    assert len(kept(world)) == 6
    assert (found.claims, found.adapters, found.trained_tokens) == (3, 1, 5)
    ended = {reason: number for reason, number in found.attempts_ended.items() if number}
    assert ended == {EndReason.COMPLETED: 1, EndReason.USER_ERROR: 1, EndReason.DRAINED: 1}

    adapters.delete(world.db, project_id=world.caller.project_id, name=adapter.id)
    commands.resume(world.db, **world.of(paused.id))

    assert read(world).adapters == 0
    assert kept(world) == counted(world)


def test_every_state_class_and_reason_is_reported_from_the_start(world: World) -> None:
    found = read(world)

    assert set(found.jobs) == {(state, each) for state in JobState for each in PriorityClass}
    assert set(found.attempts_ended) == set(EndReason)
    assert {*found.jobs.values(), *found.oldest_wait_seconds.values(), *found.leases.values()} == {0}


def test_oldest_wait_is_per_class_and_ends_with_the_claim(world: World) -> None:
    world.worker()
    world.queued(priority="urgent")
    world.clock.advance(50)
    world.queued(priority="normal")
    held = world.submit(priority="batch")
    queue_position.hold(world.db, **world.of(held.id))
    world.prepare_all()
    world.clock.advance(100)

    waits = read(world).oldest_wait_seconds

    assert waits[PriorityClass.urgent] == pytest.approx(150, abs=1)
    assert waits[PriorityClass.normal] == pytest.approx(100, abs=1)
    assert waits[PriorityClass.batch] == 0, "a held job does not wait"
    world.claim()
    assert set(read(world).oldest_wait_seconds.values()) == {0}


def test_leases_are_counted_as_held_overdue_and_expired(world: World) -> None:
    world.worker()
    world.running()
    world.submit()
    begin_preparation(world.db, "w1")
    assert read(world).leases == {"training": 1, "preparing": 1}
    assert read(world).leases_overdue == 0

    world.pass_time(LEASE + 1)

    assert read(world).leases_overdue == 1
    recovery.expire(world.db, lease_seconds=60)
    found = read(world)
    assert (found.leases_overdue, found.leases_expired) == (0, {"training": 1})
    assert found.leases == {"training": 0, "preparing": 1}
    assert kept(world) == counted(world)


def test_trainer_and_device_metrics_follow_worker_reports(world: World) -> None:
    for number, worker_id in enumerate(("w1", "w2", "silent")):
        about: dict[str, Any] = {"host": "node-1", "pid": 1, "version": "1", "memory_bytes": 100}
        devices = [{"kind": "cuda", "indices": [number % 2]}]
        workers.register_worker(world.db, worker_id=worker_id, devices=devices, **about)
    report = {"tokens_per_second": 10.0, "predicted_bytes": 70, "peak_bytes": 60}
    report["device"] = {"power_watts": 300.0, "utilization_ratio": 0.9}
    claim = world.running()
    world.pass_time(70)
    for worker_id, trainer_id in (("w1", "t1"), ("w2", None)):
        base = claim.job.base_digest if trainer_id else None
        workers.worker_beat(world.db, worker_id, resident_base=base, trainer_id=trainer_id, report=report)

    found = read(world)

    assert found.workers == {"busy": 1, "idle": 1, "draining": 0, "lost": 1, "ended": 0}
    assert (found.trainers, found.trainer_jobs) == ({"smol": 1}, {"smol": 1})
    first, second = ("node-1", "cuda:0"), ("node-1", "cuda:1")
    assert found.tokens_per_second == {first: 10.0}, "a worker without a trainer repeats the report of its last trainer"
    assert (found.predicted_bytes, found.peak_bytes) == ({first: 70}, {first: 60})
    assert found.devices[first] == {"memory_bytes": 100, "power_watts": 300.0, "utilization_ratio": 0.9}
    assert second in found.devices


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ({"kind": "cpu", "indices": [], "cores": []}, "cpu"),
        ({"kind": "cpu", "cores": [4, 5, 6, 7]}, "cpu:4-7"),
        ({"kind": "cuda", "indices": [3]}, "cuda:3"),
        ({"kind": "cuda", "indices": [0, 1]}, "cuda:0+1"),
    ],
)
def test_workers_of_one_host_are_distinguished_by_device(world: World, device: dict[str, Any], name: str) -> None:
    about: dict[str, Any] = {"host": "node-1", "pid": 1, "version": "1", "memory_bytes": 100}
    workers.register_worker(world.db, worker_id="w1", devices=[device], **about)

    assert set(read(world).devices) == {("node-1", name)}


def test_pending_webhooks_and_the_longest_delay_are_reported(world: World) -> None:
    world.clock.advance(0)
    now = world.clock.now
    with world.db.write() as session:
        about: dict[str, Any] = {"name": "n", "url": "u", "sealed_url": "u", "event_types": []}
        about |= {"salt": "s", "ending": "e"}
        times = {"secret_made_at": now, "created_at": now, "updated_at": now}
        session.add(WebhookEndpoint(id="hook", project_id=world.caller.project_id, **about, **times))
        session.flush()
        for number, due_in in enumerate((-30.0, 60.0, None)):
            delivery = {"event_id": "e", "event_type": "t", "event_at": now, "data": {}, "created_at": now}
            delivery |= {"status": "pending", "is_test": False, "num_tries": 0, "num_tries_before": 0}
            due = None if due_in is None else now + due_in
            session.add(WebhookDelivery(id=f"d{number}", endpoint_id="hook", next_try_at=due, **delivery))

    found = read(world)

    assert found.webhooks_pending == 2
    assert found.webhooks_overdue_seconds == pytest.approx(30, abs=1)


def test_uncommitted_counts_are_not_stored(world: World) -> None:
    with suppress(ValueError), world.db.write() as session:
        ledger.count(session, "claims")
        raise ValueError

    assert read(world).claims == 0


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_concurrent_counters_lose_nothing_and_do_not_deadlock(db: Database, world: World) -> None:
    def add(names: list[Any]) -> None:
        for _ in range(40):
            with db.write() as session:
                for name in names:
                    ledger.count(session, name)

    with ThreadPoolExecutor(4) as pool:
        names = ["claims", "adapters"]
        for done in [pool.submit(add, order) for order in (names, names[::-1]) * 2]:
            done.result()

    found = read(world)
    assert (found.claims, found.adapters) == (160, 160)
