"""Preemption for an urgent job: decided in the database, delivered by heartbeats, limited, and explained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from catalog.errors import Unavailable
from catalog.fleet import workers
from catalog.jobs import commands, explanation
from catalog.lifecycle import queue_position
from catalog.queue import claims, preemption
from catalog.queue.claiming import Claim
from catalog.scheduling.snapshot import USUAL, Capacity
from catalog.states import EndReason
from catalog.tables.jobs import Job
from catalog.tables.tenancy import ProjectUsage
from catalog.usage import quotas
from tests.catalog.world import World

ONE = Capacity(max_jobs=1, memory_bytes_free=10**12)
SPARED = USUAL.spared_seconds
LATE = USUAL.preempt_after_seconds + 1


@pytest.fixture
def batch(world: World) -> Claim:
    """A batch job on the only worker, which is full. It has trained long enough to be preempted."""
    world.worker()
    claim = world.running(priority="batch")
    world.pass_time(SPARED, claim.claim_id)
    world.beat(claim.claim_id)
    return claim


def test_waiting_urgent_job_preempts_a_job_of_a_lower_class(world: World, batch: Claim) -> None:
    urgent = world.queued(priority="urgent")
    assert not world.beat(batch.claim_id)[batch.claim_id].preempt, "the urgent job has not waited yet"

    world.clock.advance(LATE)
    orders = world.beat(batch.claim_id)
    state = claims.end(world.db, batch.claim_id, reason=EndReason.PREEMPTED, detail="Saved at step 5.")
    (next_one,) = world.claim(capacity=ONE)

    assert orders[batch.claim_id].preempt
    assert (state, next_one.job.id) == ("queued", urgent.id)
    left = world.job(batch.job.id)
    assert (left.counted_attempts, left.num_preemptions, left.preempted_for) == (0, 1, None)
    assert world.job(urgent.id).preemption_requested_at is None


@pytest.mark.parametrize(("step_fraction", "is_preempted"), [(0.9, True), (1.1, False)])
def test_urgent_job_of_a_project_above_its_share_waits_its_turn(
    world: World, step_fraction: float, is_preempted: bool
) -> None:
    """The rule holds against waiting jobs and against a training job."""
    world.worker()
    mine = world.running()
    world.pass_time(SPARED, mine.claim_id)
    world.beat(mine.claim_id)
    file_id = world.file(caller=world.stranger)
    world.submit(caller=world.stranger, training_file=file_id, priority="urgent")
    world.prepare_all()
    with world.db.write() as session:
        charged = SPARED + step_fraction * USUAL.class_step_seconds
        had = {"device_seconds": charged, "as_of": world.clock.now}
        session.add(ProjectUsage(project_id=world.stranger.project_id, slot=0, **had))
    world.clock.advance(LATE)

    assert world.beat(mine.claim_id)[mine.claim_id].preempt == is_preempted


def test_no_preemption_while_a_job_of_another_project_is_ahead(world: World, batch: Claim) -> None:
    file_id = world.file(caller=world.stranger)
    world.submit(caller=world.stranger, training_file=file_id)
    world.prepare_all()
    urgent = world.queued(priority="urgent")
    with world.db.write() as session:
        had = {"device_seconds": 2 * USUAL.class_step_seconds, "as_of": world.clock.now}
        session.add(ProjectUsage(project_id=world.caller.project_id, slot=99, **had))
    world.clock.advance(LATE)

    assert not world.beat(batch.claim_id)[batch.claim_id].preempt
    with world.db.write() as session:
        session.delete(session.get_one(ProjectUsage, (world.caller.project_id, 99)))
    assert world.beat(batch.claim_id)[batch.claim_id].preempt
    assert world.job(urgent.id).preemption_requested_at is not None


def test_freed_slot_goes_to_the_preempting_job_not_to_a_loaded_base(world: World, batch: Claim) -> None:
    urgent = world.queued(model=world.base("another"), priority="urgent")
    world.clock.advance(LATE)
    assert world.beat(batch.claim_id)[batch.claim_id].preempt
    world.queued(priority="urgent")
    claims.end(world.db, batch.claim_id, reason=EndReason.PREEMPTED, detail="")

    (claim,) = world.claim(capacity=replace(ONE, resident_key=batch.job.pack_key))

    assert claim.job.id == urgent.id


def test_preempted_job_returns_to_its_position(world: World, batch: Claim) -> None:
    world.queued(priority="batch")
    urgent = world.queued(priority="urgent")
    world.clock.advance(LATE)
    world.beat(batch.claim_id)
    claims.end(world.db, batch.claim_id, reason=EndReason.PREEMPTED, detail="")

    order = [claim.job.id for _ in range(2) for claim in world.claim(capacity=ONE)]

    assert order == [urgent.id, batch.job.id]


def test_preemption_is_explained_without_naming_other_projects(world: World, batch: Claim) -> None:
    foreign = world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger), priority="urgent")
    world.prepare_all()
    world.clock.advance(LATE)
    world.beat(batch.claim_id)

    requested = explanation.explain(world.db, **world.of(batch.job.id))
    waiting = explanation.explain(world.db, project_id=world.stranger.project_id, job_id=foreign.id)
    claims.end(world.db, batch.claim_id, reason=EndReason.PREEMPTED, detail="Saved at step 5.")
    left = explanation.explain(world.db, **world.of(batch.job.id))

    assert requested["explanation"] == (
        "An urgent job is preempting it. Worker w1 was asked to save a checkpoint first. "
        "It then returns to its position in the queue."
    )
    assert "Jobs with a lower priority free memory for it" in waiting["explanation"]
    assert left["explanation"].startswith("A job with priority urgent that had waited for 31 s preempted it.")
    reported = left["preemption"]
    assert (reported["for_class"], reported["makes"], reported["num_leaving"], reported["effective_priority"]) == (
        0,
        "a place",
        1,
        2,
    )
    assert (reported["num_preemptions_before"], reported["policy"]["max_preemptions"]) == (0, USUAL.max_preemptions)
    assert reported["trained_seconds"] > SPARED
    events = world.events(batch.job.id)
    assert [event.message for event in events][-2:] == [
        "An urgent job preempts this job. It saves a checkpoint and returns to its position in the queue.",
        "An urgent job preempted this job. It returned to its position in the queue. Saved at step 5.",
    ]
    for secret in (foreign.id, world.stranger.project_id, "theirs"):
        assert secret not in str((requested, left, [(event.message, event.data) for event in events]))


def test_jobs_behind_are_informed_of_a_preemption(world: World, batch: Claim) -> None:
    key, base = batch.job.pack_key, batch.job.base_digest
    workers.register_trainer(world.db, trainer_id="t", worker_id="w1", base_digest=base, pack_key=key)
    workers.worker_beat(world.db, "w1", resident_base=base, trainer_id="t", report=None)
    urgent, behind = world.queued(model=world.base("another"), priority="urgent"), world.queued()

    def reported(job: Job) -> str:
        return explanation.explain(world.db, **world.of(job.id))["explanation"]

    before = reported(urgent), reported(behind)
    world.clock.advance(LATE)
    world.beat(batch.claim_id)
    meanwhile = reported(urgent), reported(behind)

    assert "Later jobs for a loaded base model may start before it, for at most 60 s." in before[0]
    assert (
        "A worker has its base model loaded. It starts as soon as that worker has memory for one more job." in before[1]
    )
    assert "Later jobs do not start before it. Jobs with a lower priority free" in meanwhile[0]
    assert "other jobs are being preempted for a job that is ahead of it." in meanwhile[1]


def test_one_urgent_job_preempts_one_job_at_a_time(world: World, batch: Claim) -> None:
    world.worker("w2")
    world.queued(priority="batch")
    (other,) = world.claim("w2", ONE)
    both = (batch.claim_id, other.claim_id)
    world.pass_time(SPARED, *both)
    world.queued(priority="urgent")
    world.clock.advance(LATE)
    for worker_id in ("w1", "w2"):
        world.beat(worker_id=worker_id)

    for _ in range(3):
        world.beat(*both)
        world.clock.advance(1)

    assert sum(order.preempt for order in world.beat(*both).values()) == 1


def test_preemption_is_withdrawn_once_the_urgent_job_starts_elsewhere(world: World, batch: Claim) -> None:
    urgent = world.queued(priority="urgent")
    world.clock.advance(LATE)
    preemption.request_preemptions(world.db, policy=USUAL)
    world.worker("w2")
    (claim,) = world.claim("w2", ONE)

    orders = world.beat(batch.claim_id)

    assert claim.job.id == urgent.id
    assert orders[batch.claim_id] == claims.ClaimDirectives()


@pytest.mark.parametrize("kept_back", ["held", "limited"])
def test_preemption_is_withdrawn_while_the_urgent_job_cannot_start(world: World, batch: Claim, kept_back: str) -> None:
    urgent = world.queued(model=world.base("another"), priority="urgent")
    world.clock.advance(LATE)
    assert preemption.request_preemptions(world.db, policy=USUAL) == 1

    keep_back(world, urgent, kept_back)
    assert world.beat(batch.claim_id)[batch.claim_id] == claims.ClaimDirectives()
    let_begin(world, urgent, kept_back)

    joiner = world.queued()
    joined = world.claim(capacity=replace(ONE, num_jobs=1), pack_key=batch.job.pack_key)
    assert [claim.job.id for claim in joined] == [joiner.id]
    world.complete(joined[0].claim_id)
    world.clock.advance(LATE)
    assert world.beat(batch.claim_id)[batch.claim_id].preempt, "the request is repeated before the two minutes are over"


@pytest.mark.parametrize(("may_train", "before", "after"), [(2, 1, 0), (3, 2, 1)])
def test_preemption_is_limited_by_the_quota_of_the_project(
    world: World, batch: Claim, may_train: int, before: int, after: int
) -> None:
    limit(world, concurrent_jobs=may_train)
    for _ in range(2):
        world.queued(priority="urgent")
    world.clock.advance(LATE)

    found = [num_urgent(world)]
    world.beat(batch.claim_id)
    found.append(num_urgent(world))

    assert found == [before, after]


def test_partially_freed_memory_is_not_taken_by_a_joiner(world: World) -> None:
    world.worker()
    for _ in range(2):
        world.queued(priority="batch")
    held = world.claim()
    key = held[0].job.pack_key
    world.pass_time(SPARED, *(claim.claim_id for claim in held))
    urgent = world.queued(priority="urgent")
    world.queued()
    world.clock.advance(LATE)
    world.beat(*(claim.claim_id for claim in held))
    free_so_far = Capacity(max_jobs=1, memory_bytes_free=urgent.own_bytes or 0, num_jobs=1)
    with world.db.write() as session:
        session.get_one(Job, urgent.id).own_bytes = free_so_far.memory_bytes_free + 1

    assert world.claim(capacity=free_so_far, pack_key=key) == []
    with world.db.write() as session:
        session.get_one(Job, urgent.id).preemption_requested_at = None
    assert len(world.claim(capacity=free_so_far, pack_key=key)) == 1


@pytest.mark.parametrize("fault", [Unavailable("database_unavailable"), RuntimeError("odd")])
def test_error_in_a_preemption_decision_does_not_affect_leases(
    world: World,
    batch: Claim,
    fault: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise fault

    monkeypatch.setattr(preemption, "request_preemptions", fail)
    before = world.job(batch.job.id).lease_expires_at
    world.clock.advance(10)

    orders = world.beat(batch.claim_id)

    assert orders == {batch.claim_id: claims.ClaimDirectives()}
    assert (world.job(batch.job.id).lease_expires_at or 0) >= (before or 0) + 10
    assert "preemption" in caplog.text


def test_job_is_preempted_a_limited_number_of_times(world: World, batch: Claim) -> None:
    held = batch
    for _ in range(USUAL.max_preemptions):
        assert leaves(world, held)
        (held,) = world.claim(capacity=ONE)
        assert held.job.id == batch.job.id
        world.pass_time(SPARED, held.claim_id)

    assert not leaves(world, held)


def leaves(world: World, held: Claim) -> bool:
    """Queue an urgent job and return whether it preempts the held one. If so, it trains and completes."""
    urgent = world.queued(priority="urgent")
    world.beat(held.claim_id)
    world.clock.advance(LATE)
    if not world.beat(held.claim_id)[held.claim_id].preempt:
        return False
    claims.end(world.db, held.claim_id, reason=EndReason.PREEMPTED, detail="")
    (claim,) = world.claim(capacity=ONE)
    assert claim.job.id == urgent.id
    world.complete(claim.claim_id, claim.claim_id)
    return True


def test_job_promoted_above_urgent_is_not_preempted(world: World) -> None:
    world.worker()
    world.queued(priority="batch")
    world.clock.advance(3 * USUAL.priority_aging_seconds)
    (risen,) = world.claim(capacity=ONE)
    world.pass_time(SPARED, risen.claim_id)
    world.queued(priority="urgent")
    world.clock.advance(LATE)

    assert not world.beat(risen.claim_id)[risen.claim_id].preempt


def test_preemption_can_be_disabled(world: World, batch: Claim) -> None:
    world.queued(priority="urgent")
    world.clock.advance(LATE)

    assert preemption.request_preemptions(world.db, policy=replace(USUAL, max_preemptions=0)) == 0
    assert preemption.request_preemptions(world.db, policy=USUAL) == 1


def test_user_pause_takes_precedence_over_preemption(world: World, batch: Claim) -> None:
    world.queued(priority="urgent")
    world.clock.advance(LATE)
    world.beat(batch.claim_id)
    commands.pause(world.db, **world.of(batch.job.id))

    state = claims.end(world.db, batch.claim_id, reason=EndReason.PREEMPTED, detail="")

    assert state == "paused"
    with world.db.read() as session:
        job: Any = session.get_one(Job, batch.job.id)
        assert job.preempted_for is None


def keep_back(world: World, job: Job, how: str) -> None:
    if how == "held":
        queue_position.hold(world.db, **world.of(job.id))
    else:
        limit(world, concurrent_jobs=1)


def let_begin(world: World, job: Job, how: str) -> None:
    if how == "held":
        queue_position.release(world.db, **world.of(job.id))
    else:
        limit(world, concurrent_jobs=9)


def num_urgent(world: World) -> int:
    with world.db.read() as session:
        found = preemption._urgent_entries(session, now=world.clock.now, policy=USUAL)  # pyright: ignore[reportPrivateUsage]
    return len(found)


def limit(world: World, *, concurrent_jobs: int) -> None:
    operator = replace(world.caller, is_operator=True)
    quotas.limit(world.db, caller=operator, project="ours", limits={"concurrent_jobs": concurrent_jobs})
