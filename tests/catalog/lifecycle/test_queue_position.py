"""Queue positions, holds and deadlines within a project. None of them changes the turn of another project."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.jobs import commands, explanation
from catalog.lifecycle import deadlines, queue_position, recording
from catalog.lifecycle.queue_position import MoveTarget
from catalog.queue import claims, listing, notifier
from catalog.scheduling.snapshot import Capacity
from catalog.states import EndReason
from catalog.tables.jobs import Job
from tests.catalog.world import World

ONE = Capacity(max_jobs=1, memory_bytes_free=10**12)


def order(world: World) -> list[str]:
    with world.db.read() as session:
        return [entry.candidate.job_id for entry in listing.queue_entries(session, now=world.clock())]


def move(world: World, job: Job, **target: Any) -> Job:
    return queue_position.move_to(world.db, **world.of(job.id), target=MoveTarget(**target))


def test_job_moves_before_after_first_and_last(world: World) -> None:
    a, b, c, d = (world.queued() for _ in range(4))

    for target, expected in (
        ({"before": b.id}, [a, d, b, c]),
        ({"after": b.id}, [a, b, d, c]),
        ({"to": "first"}, [d, a, b, c]),
        ({"to": "last"}, [a, b, c, d]),
    ):
        move(world, d, **target)
        assert order(world) == [job.id for job in expected]
    (claim,) = world.claim(capacity=ONE)
    assert claim.job.id == a.id
    assert "directly after" in str([event.message for event in world.events(d.id)])


def test_positions_too_close_for_floats_are_spread(world: World) -> None:
    first = world.queued()
    world.flood(first, 3)
    with world.db.write() as session:
        for job in session.query(Job):
            job.place = first.place
    ids = order(world)
    last = world.queued()

    for _ in range(60):
        move(world, last, before=ids[1])
        move(world, last, after=ids[0])

    assert order(world) == [ids[0], last.id, *ids[1:]]


def test_move_target_must_wait_in_the_same_class_and_project(world: World) -> None:
    job, urgent = world.queued(), world.queued(priority="urgent")
    foreign = world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))
    world.prepare_all()

    for target, message in (
        ({}, "but none of them is set"),
        ({"before": urgent.id, "to": "first"}, "but 'before' and 'to' are set"),
        ({"before": urgent.id, "after": urgent.id, "to": "first"}, "but all of them are set"),
        ({"before": job.id}, "next to itself"),
    ):
        with pytest.raises(InvalidRequest, match=message) as invalid:
            move(world, job, **target)
        assert invalid.value.param == next(reversed(target), None)
    with pytest.raises(Conflict, match=f"Job {urgent.id} has priority 'urgent', but job {job.id} has") as refusal:
        move(world, job, after=urgent.id)
    assert (refusal.value.code, refusal.value.param) == ("invalid_transition", "after")
    with pytest.raises(NotFound):
        move(world, job, before=foreign.id)
    with pytest.raises(NotFound):
        queue_position.move_to(world.db, **world.of(foreign.id), target=MoveTarget(to="first"))
    (claim,) = world.claim(capacity=ONE)
    with pytest.raises(Conflict) as refusal:
        move(world, claim.job, to="last")
    assert refusal.value.code == "invalid_transition"
    assert refusal.value.remedy == "No action is needed: the job is already training."


def test_moves_do_not_change_the_positions_of_other_projects(world: World) -> None:
    mine = [world.queued() for _ in range(3)]
    foreign = world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))
    world.prepare_all()
    before = order(world).index(foreign.id)

    for job in mine:
        move(world, job, to="first")

    assert order(world).index(foreign.id) == before == 1


def test_held_job_is_prepared_but_waits_until_released(world: World) -> None:
    job = world.submit()
    queue_position.hold(world.db, **world.of(job.id))
    world.prepare_all()
    behind = world.queued()

    assert world.job(job.id).state == "queued"
    assert order(world) == [behind.id]
    assert [claim.job.id for claim in world.claim(capacity=Capacity(max_jobs=4, memory_bytes_free=10**12))] == [
        behind.id
    ]
    assert world.claim(pack_key=job.pack_key) == []
    assert not notifier.has_work(world.db)
    why = explanation.explain(world.db, **world.of(job.id))
    assert (why["is_held"], why["explanation"]) == (
        True,
        f"It is held. To let it start, release it: `lorry jobs release {job.id}`.",
    )
    world.clock.advance(100)
    for _ in range(2):
        assert queue_position.release(world.db, **world.of(job.id)).queued_at == world.job(job.id).queued_at
    assert explanation.explain(world.db, **world.of(job.id))["waited_seconds"] < 1
    (claim,) = world.claim(capacity=ONE)
    assert claim.job.id == job.id


def test_only_waiting_jobs_can_be_held_and_a_pause_ends_the_hold(world: World) -> None:
    claim = world.running()
    with pytest.raises(Conflict) as refusal:
        queue_position.hold(world.db, **world.of(claim.job.id))
    assert refusal.value.code == "invalid_transition"
    assert f"`lorry jobs pause {claim.job.id}`" in refusal.value.remedy
    held = world.queued()
    queue_position.hold(world.db, **world.of(held.id))
    commands.pause(world.db, **world.of(held.id))
    for act, remedy in (
        (queue_position.hold, "No action is needed"),
        (queue_position.release, f"Resume the job: `lorry jobs resume {held.id}`."),
        (partial(queue_position.move_to, target=MoveTarget(to="first")), "Resume the job, then move it: "),
    ):
        with pytest.raises(Conflict, match=f"Job {held.id} is paused, so it can't be") as refusal:
            act(world.db, **world.of(held.id))
        assert refusal.value.remedy.startswith(remedy)
    commands.resume(world.db, **world.of(held.id))

    assert not world.job(held.id).is_held
    assert order(world) == [held.id]


def test_jobs_with_deadlines_go_first_by_required_start(world: World) -> None:
    now = int(world.clock.now)
    plain, late, soon = world.queued(), world.queued(deadline=now + 7200), world.queued(deadline=now + 3600)
    foreign = world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))
    world.prepare_all()

    assert order(world) == [soon.id, foreign.id, late.id, plain.id]
    move(world, plain, to="first")
    assert order(world) == [plain.id, foreign.id, soon.id, late.id]


def test_required_start_is_estimated_from_past_step_times(world: World) -> None:
    claim = world.running()
    claims.started(world.db, claim.claim_id, trainer_id="t", resumed_from_step=None)
    world.pass_time(50, claim.claim_id)
    world.complete(claim.claim_id)
    deadline = int(world.clock.now) + 1000

    job = world.queued(deadline=deadline)
    world.worker()

    assert job.needed_start == pytest.approx(deadline - 50, abs=1)
    why = explanation.explain(world.db, **world.of(job.id))
    assert (why["deadline"], why["is_late"]) == (deadline, False)
    assert "the job must start within 9" in why["explanation"]


def test_job_that_will_miss_its_deadline_warns_once_and_continues(world: World) -> None:
    job, other = world.queued(deadline=int(world.clock.now) + 60), world.queued()
    assert deadlines.notify_late(world.db) == 0

    world.clock.advance(100)
    num_late = [deadlines.notify_late(world.db) for _ in range(2)]

    assert num_late == [1, 0]
    warnings = [event for event in world.events(job.id) if event.level == "warn"]
    assert [event.message[:52] for event in warnings] == ["The job will miss its deadline. To meet its deadline"]
    assert explanation.explain(world.db, **world.of(job.id))["is_late"]
    assert [claim.job.id for claim in world.claim()] == [job.id, other.id]


def test_running_job_is_late_by_its_reported_remaining_time(world: World) -> None:
    claim = world.running(deadline=int(world.clock.now) + 600)
    recording.record_progress(world.db, claim.claim_id, {"step": 1, "seconds_left": 900})

    assert deadlines.notify_late(world.db) == 1
    assert "after its deadline" in explanation.explain(world.db, **world.of(claim.job.id))["explanation"]


def test_requeued_job_keeps_its_position(world: World) -> None:
    first, second = world.queued(), world.queued()
    move(world, second, to="first")
    (claim,) = world.claim(capacity=ONE)

    claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="")

    assert claim.job.id == second.id
    assert order(world) == [second.id, first.id]
    assert queue_position.of_new(5.0, None) == 5.0
