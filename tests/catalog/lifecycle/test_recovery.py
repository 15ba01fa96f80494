"""Recovery of jobs whose worker stopped its heartbeats. Outages and clock changes cost no job an attempt."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlalchemy.orm import Session

from catalog.errors import StaleClaim
from catalog.fleet import workers
from catalog.jobs import commands
from catalog.lifecycle import preparation, recording, recovery, transitions
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.states import MAX_LOSSES, EndReason, JobState
from catalog.tables.fleet import DatabaseHeartbeat
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from catalog.tasks import outcomes
from catalog.tasks.task_queue import MAX_ATTEMPTS, TaskKind
from tests.catalog.sweeping import make
from tests.catalog.world import LEASE, World, begin_preparation, claim_task, manifest


def test_job_with_an_expired_lease_is_requeued(world: World) -> None:
    claim = world.running()
    world.pass_time(LEASE + 1)

    assert recovery.expire(world.db, lease_seconds=LEASE) == 1

    job = world.job(claim.job.id)
    assert (job.state, job.reason, job.counted_attempts) == (JobState.QUEUED, EndReason.INFRA_LOST, 0)
    with pytest.raises(StaleClaim):
        world.complete(claim.claim_id)


def test_renewed_lease_does_not_expire(world: World) -> None:
    claim = world.running()

    world.pass_time(10 * LEASE, claim.claim_id)

    assert recovery.expire(world.db, lease_seconds=LEASE) == 0
    world.complete(claim.claim_id)


def test_late_heartbeat_before_recovery_keeps_the_claim(world: World) -> None:
    claim = world.running()
    world.pass_time(LEASE + 1)

    assert not world.beat(claim.claim_id)[claim.claim_id].stale
    assert recovery.expire(world.db, lease_seconds=LEASE) == 0


def test_leases_get_a_grace_period_after_an_outage(world: World) -> None:
    alive, dead = world.queued(), world.queued()
    by_job = {claim.job.id: claim.claim_id for claim in world.claim()}
    world.clock.advance(600)  # neither recovery nor heartbeats run

    first_look = recovery.expire(world.db, lease_seconds=LEASE)
    world.pass_time(LEASE - 1, by_job[alive.id])
    within_grace = recovery.expire(world.db, lease_seconds=LEASE)
    world.pass_time(2, by_job[alive.id])
    after_grace = recovery.expire(world.db, lease_seconds=LEASE)

    assert (first_look, within_grace, after_grace) == (0, 0, 1)
    assert world.job(alive.id).state == JobState.RUNNING
    assert world.job(dead.id).state == JobState.QUEUED


def test_infrequent_recovery_requeues_a_job_at_the_second_run(world: World) -> None:
    world.running()
    found = 0

    for _ in range(2):
        world.clock.advance(5 * LEASE)
        found += recovery.expire(world.db, lease_seconds=LEASE)

    assert found == 1


@pytest.mark.parametrize("hours", [1, -1])
def test_clock_change_of_an_hour_expires_and_strands_no_job(world: World, hours: int) -> None:
    claim = world.running()
    world.clock.advance(hours * 3600)

    assert recovery.expire(world.db, lease_seconds=LEASE) == 0
    world.pass_time(LEASE / 2, claim.claim_id)
    assert recovery.expire(world.db, lease_seconds=LEASE) == 0
    world.pass_time(LEASE + 2)
    assert recovery.expire(world.db, lease_seconds=LEASE) == 1


def test_clock_set_back_does_not_strand_the_job_of_a_dead_worker(world: World) -> None:
    world.running()
    world.beat()
    world.clock.advance(-3600)

    world.pass_time(LEASE + 15)

    assert recovery.expire(world.db, lease_seconds=LEASE) == 1


def test_cancel_and_pause_requests_outlive_a_lost_worker(world: World) -> None:
    cancelled, paused = world.queued(), world.queued()
    world.claim()
    commands.cancel(world.db, **world.of(cancelled.id))
    commands.pause(world.db, **world.of(paused.id))
    world.pass_time(LEASE + 1)

    recovery.expire(world.db, lease_seconds=LEASE)

    assert world.job(cancelled.id).state == JobState.CANCELLED
    assert world.job(paused.id).state == JobState.PAUSED


def _lose_workers(world: World, number: int) -> None:
    """Lose workers one after the other, each with the only job."""
    for _ in range(number):
        assert len(world.claim()) == 1
        world.pass_time(LEASE + 31)
        recovery.expire(world.db, lease_seconds=LEASE)
        world.pass_time(31)


def test_job_that_loses_ten_workers_in_a_row_is_quarantined(world: World) -> None:
    job = world.queued()

    _lose_workers(world, MAX_LOSSES - 1)
    before = world.job(job.id)
    _lose_workers(world, 1)

    assert (before.state, before.counted_attempts) == (JobState.QUEUED, 0)
    ended = world.job(job.id)
    assert ended.state == JobState.FAILED
    assert ended.error is not None
    assert ended.error["code"] == "quarantined"
    assert len(ended.error["evidence"]) == MAX_LOSSES
    assert world.claim() == []


def test_lost_worker_count_resets_after_a_checkpoint_or_another_end(world: World) -> None:
    job = world.queued()
    _lose_workers(world, MAX_LOSSES - 1)
    (claim,) = world.claim()
    saved = manifest("checkpoint", kind="checkpoint")
    recording.record_checkpoint(world.db, claim.claim_id, step=5, artifact=saved)
    world.clock.advance(1)
    claims.end(world.db, claim.claim_id, reason=EndReason.INFRA_LOST, detail="")
    world.pass_time(31)
    after_checkpoint = world.job(job.id).state
    _lose_workers(world, MAX_LOSSES - 2)
    (claim,) = world.claim()
    claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="")

    _lose_workers(world, MAX_LOSSES - 1)

    assert after_checkpoint == world.job(job.id).state == JobState.QUEUED


def test_resuming_a_job_resets_its_lost_worker_count(world: World) -> None:
    job = world.queued()
    _lose_workers(world, MAX_LOSSES - 1)
    commands.pause(world.db, **world.of(job.id))
    commands.resume(world.db, **world.of(job.id))

    _lose_workers(world, MAX_LOSSES - 1)
    before = world.job(job.id).state
    _lose_workers(world, 1)

    assert [before, world.job(job.id).state] == [JobState.QUEUED, JobState.FAILED]


def test_incomplete_gang_does_not_reset_the_lost_worker_count(world: World) -> None:
    job = world.queued()
    _lose_workers(world, MAX_LOSSES - 1)
    (claim,) = world.claim()
    claims.end(world.db, claim.claim_id, reason=EndReason.GANG_INCOMPLETE, detail="")

    _lose_workers(world, 1)

    assert world.job(job.id).state == JobState.FAILED


def _lose(world: World, claimed: list[Claim]) -> None:
    """End the claims as lost with their worker."""
    for claim in claimed:
        claims.end(world.db, claim.claim_id, reason=EndReason.INFRA_LOST, detail="")
    world.pass_time(31)


def test_jobs_train_alone_after_two_lost_workers_until_a_checkpoint(world: World) -> None:
    first, second = world.queued(), world.queued()

    _lose(world, world.claim())
    together = world.claim()
    _lose(world, together)
    (alone,) = world.claim()

    assert {claim.job.id for claim in together} == {first.id, second.id}
    world.worker("w2")
    assert [len(world.claim("w2")), world.claim(pack_key=alone.job.pack_key)] == [1, []]
    recording.record_checkpoint(world.db, alone.claim_id, step=5, artifact=manifest("saved", kind="checkpoint"))
    third = world.queued()
    assert [claim.job.id for claim in world.claim(pack_key=alone.job.pack_key)] == [third.id]


def test_job_that_kills_its_worker_is_quarantined_and_packmates_succeed(world: World) -> None:
    """A container's memory limit does this: it kills worker and trainer together."""
    poison, *mates = (world.queued() for _ in range(3))
    company: list[int] = []
    while claimed := world.claim():
        if any(claim.job.id == poison.id for claim in claimed):
            company.append(len(claimed))
            _lose(world, claimed)
        else:
            for claim in claimed:
                world.complete(claim.claim_id, claim.claim_id)
        world.pass_time(31)

    assert [world.job(job.id).state for job in (poison, *mates)] == ["failed", "succeeded", "succeeded"]
    assert [world.job(job.id).attempt for job in mates] == [3, 3]
    assert company == [3, 3] + [1] * (MAX_LOSSES - 2)


def test_lost_preparation_is_repeated_without_an_attempt(world: World) -> None:
    job = world.submit()
    lost = begin_preparation(world.db)
    assert lost is not None
    assert begin_preparation(world.db, "w2") is None, "not yet"
    world.pass_time(LEASE + 1)

    again = begin_preparation(world.db, "w2")

    assert again is not None
    assert (world.job(job.id).attempt, world.job(job.id).counted_attempts) == (0, 0)
    with pytest.raises(StaleClaim):
        preparation.finish(world.db, lost.task, num_steps=1)
    preparation.finish(world.db, again.task, num_steps=1)
    assert world.job(job.id).state == JobState.QUEUED


def test_file_that_kills_every_worker_is_finally_rejected(world: World) -> None:
    job = world.submit()

    for _ in range(MAX_ATTEMPTS[TaskKind.PREPARATION]):
        assert begin_preparation(world.db) is not None
        world.pass_time(LEASE + 1)
    outcomes.fail_lost(world.db, claim_task(world.db, TaskKind.PREPARATION), preparation.PREPARATION)

    failed = world.job(job.id)
    assert (failed.state, (failed.error or {})["code"]) == (JobState.FAILED, "preparation_failed")
    assert "failed 5 times" in (failed.error or {})["message"]


def test_reregistered_worker_releases_the_jobs_of_its_predecessor(world: World) -> None:
    world.worker()
    claim = world.running()

    world.worker()

    assert world.beat(claim.claim_id)[claim.claim_id].stale
    assert world.job(claim.job.id).state == JobState.QUEUED
    assert _detail(world, claim) == "Worker w1 was restarted."


def test_worker_declared_lost_is_recovered_at_once(world: World) -> None:
    world.worker()
    claim = world.running()

    assert workers.declare_lost(world.db, "w1") == 1
    assert workers.declare_lost(world.db, "w1") == 0

    assert world.job(claim.job.id).reason == EndReason.INFRA_LOST
    assert _detail(world, claim) == "The process of worker w1 has ended."


def _detail(world: World, claim: Claim) -> str | None:
    """Return the reason with which the claim's attempt ended."""
    with world.db.read() as session:
        return session.scalar(select(Attempt.detail).where(Attempt.claim_id == claim.claim_id))


def test_claiming_recovers_expired_leases_first(world: World) -> None:
    lost = world.running()
    world.pass_time(LEASE + 1)

    assert world.claim("w2") == []  # back-off
    world.pass_time(3)
    (again,) = world.claim("w2")

    assert again.job.id == lost.job.id
    assert again.attempt == 2


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("seconds", [0, LEASE / 4])
def test_heartbeat_does_not_wait_for_a_concurrent_pulse_update(world: World, seconds: float) -> None:
    claim = world.running()
    world.beat()
    world.clock.advance(seconds)

    with ThreadPoolExecutor(1) as pool, world.db.write() as session:
        session.get_one(DatabaseHeartbeat, 1, with_for_update=True)
        orders = pool.submit(world.beat, claim.claim_id).result(timeout=20)

    assert not orders[claim.claim_id].stale


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_rows_are_locked_in_order_worker_first_then_jobs_by_id(world: World) -> None:
    world.worker()
    claim = world.running()
    world.queued()
    world.claim()
    world.clock.advance(600)  # after a gap a heartbeat extends every lease
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(" ".join(statement.split()))

    event.listen(world.db.engine, "before_cursor_execute", note)
    event.listen(world.db.engine, "commit", lambda _connection: statements.append("COMMIT"))
    world.beat(claim.claim_id)
    workers.end_worker(world.db, "w1")

    of_jobs = [text for text in statements if " FROM jobs" in text and "FOR UPDATE" in text]
    assert len(of_jobs) == 3
    assert all("ORDER BY jobs.id FOR UPDATE" in text for text in of_jobs)
    extending, beating, ending = (tables for tables in first_locks(statements) if "jobs" in tables)
    assert extending[:2] == ["pulse", "jobs"]
    assert beating[:2] == ending[:2] == ["workers", "jobs"]


def first_locks(statements: list[str]) -> list[list[str]]:
    """Return per transaction the tables with locked rows, in the order of their first lock."""
    found: list[list[str]] = [[]]
    for text in statements:
        if text == "COMMIT":
            found.append([])
        elif "FOR UPDATE" in text or text.startswith("UPDATE"):
            table = text.split()[1] if text.startswith("UPDATE") else text.partition(" FROM ")[2].split()[0]
            found[-1] += [table] if table not in found[-1] else []
    return found


@pytest.mark.both_databases
@pytest.mark.parametrize("leaves", [False, True], ids=["lost", "leaves"])
def test_trials_that_end_with_their_worker_lock_sweeps_in_one_order(
    world: World, monkeypatch: pytest.MonkeyPatch, *, leaves: bool
) -> None:
    sweeps = [make(world, parameters={"lora.rank": {"values": [4]}}) for _ in range(6)]
    world.worker()
    world.prepare_all()
    trials = [claim.job for claim in world.claim()]
    for job in trials:
        commands.cancel(world.db, **world.of(job.id))
    taken: list[str | None] = []

    def noted(session: Session, job: Job, before: JobState | None, *, now: float) -> None:
        taken.append(job.sweep_id)

    monkeypatch.setattr(transitions, "OBSERVERS", (noted, *transitions.OBSERVERS))
    if leaves:
        workers.end_worker(world.db, "w1")
    else:
        world.pass_time(LEASE + 1)
        recovery.expire(world.db, lease_seconds=LEASE)

    assert taken == sorted(sweeps)
    assert {world.job(job.id).state for job in trials} == {JobState.CANCELLED}
