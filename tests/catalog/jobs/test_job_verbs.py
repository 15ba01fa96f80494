"""Canceling, pausing and resuming jobs in each state."""

from __future__ import annotations

from typing import Any

import pytest

from catalog.errors import Conflict
from catalog.jobs import commands
from catalog.lifecycle import queue_position
from catalog.queue import claims
from catalog.states import EndReason, JobState
from tests.catalog.world import World, begin_preparation


def test_waiting_job_is_canceled_at_once(world: World) -> None:
    validating = world.submit()
    queued = world.queued()
    paused = world.submit()
    verbs: dict[str, Any] = {"project_id": world.caller.project_id}
    commands.pause(world.db, job_id=paused.id, **verbs)

    states = {commands.cancel(world.db, job_id=job.id, **verbs).state for job in (validating, queued, paused)}

    assert states == {JobState.CANCELLED}
    assert world.job(queued.id).finished_at is not None
    assert world.job(queued.id).reason == EndReason.CANCELLED_BY_USER


def test_running_job_is_canceled_by_its_worker(world: World) -> None:
    claim = world.running()

    requested = commands.cancel(world.db, **world.of(claim.job.id))
    orders = world.beat(claim.claim_id)
    state = claims.end(world.db, claim.claim_id, reason=EndReason.CANCELLED_BY_USER, detail="")

    assert (requested.state, requested.cancel_requested) == (JobState.RUNNING, True)
    assert orders[claim.claim_id].cancel
    assert state == JobState.CANCELLED
    assert not world.job(claim.job.id).cancel_requested


def test_finished_job_cannot_be_canceled_paused_or_resumed(world: World) -> None:
    job = world.submit()
    commands.cancel(world.db, **world.of(job.id))

    for verb in (commands.cancel, commands.pause, commands.resume):
        with pytest.raises(Conflict) as refusal:
            verb(world.db, **world.of(job.id))
        assert refusal.value.code == "invalid_transition"
        assert refusal.value.remedy


def test_paused_job_with_prepared_files_resumes_into_the_queue(world: World) -> None:
    job = world.queued()
    verb = world.of(job.id)

    assert commands.pause(world.db, **verb).state == JobState.PAUSED
    assert commands.pause(world.db, **verb).state == JobState.PAUSED
    assert commands.resume(world.db, **verb).state == JobState.QUEUED

    assert world.transitions(job.id)[-2:] == [("paused", "validating_files"), ("validating_files", "queued")]


def test_remedy_for_resuming_a_held_job_is_to_release_it(world: World) -> None:
    job = world.queued()

    def remedy() -> str:
        with pytest.raises(Conflict) as refused:
            commands.resume(world.db, **world.of(job.id))
        return refused.value.remedy

    assert remedy() == "No action is needed: the job continues without being resumed."
    queue_position.hold(world.db, **world.of(job.id))
    assert remedy() == f"The job is held. To let it start, release it with `lorry jobs release {job.id}`."


def test_job_paused_before_preparation_is_prepared_after_resuming(world: World) -> None:
    job = world.submit()
    verb = world.of(job.id)
    commands.pause(world.db, **verb)

    assert begin_preparation(world.db, "w") is None
    assert commands.resume(world.db, **verb).state == JobState.VALIDATING_FILES
    assert begin_preparation(world.db, "w") is not None


def test_running_job_is_paused_by_its_worker_and_resumes(world: World) -> None:
    claim = world.running()
    verb = world.of(claim.job.id)

    commands.pause(world.db, **verb)
    order = world.beat(claim.claim_id)[claim.claim_id]
    state = claims.end(world.db, claim.claim_id, reason=EndReason.PAUSED_BY_USER, detail="")
    commands.resume(world.db, **verb)

    assert order.pause
    assert state == JobState.PAUSED
    assert world.claim()[0].attempt == 2
    assert world.job(claim.job.id).counted_attempts == 0


def test_withdrawn_pause_returns_the_job_to_the_queue(world: World) -> None:
    claim = world.running()
    verb = world.of(claim.job.id)
    commands.pause(world.db, **verb)

    commands.resume(world.db, **verb)
    state = claims.end(world.db, claim.claim_id, reason=EndReason.PAUSED_BY_USER, detail="")

    assert state == JobState.QUEUED


def test_job_being_canceled_cannot_be_paused_or_resumed(world: World) -> None:
    claim = world.running()
    verb = world.of(claim.job.id)
    commands.cancel(world.db, **verb)
    commands.cancel(world.db, **verb)

    for ask, code in ((commands.pause, "invalid_transition"), (commands.resume, "invalid_transition")):
        with pytest.raises(Conflict, match="because it is being cancelled") as refusal:
            ask(world.db, **verb)
        assert (refusal.value.code, refusal.value.remedy) == (code, "To train again, create a new job.")
