"""File preparation: leased to one worker, released, or rejected."""

from __future__ import annotations

from dataclasses import replace

import pytest

from catalog.error_texts import ErrorText
from catalog.errors import StaleClaim
from catalog.jobs import commands
from catalog.lifecycle import preparation, recording
from catalog.queue import claims
from catalog.states import EndReason, JobState
from catalog.tasks import outcomes, task_queue
from catalog.tasks.task_queue import TaskKind
from tests.catalog.world import LEASE, World, begin_preparation, manifest, try_claim


def test_unusable_files_fail_the_job_with_the_reported_error(world: World) -> None:
    job = world.submit()
    unprepared = begin_preparation(world.db, "w1")
    assert unprepared is not None

    error = ErrorText(code="nothing_to_learn", message="All masked.", remedy="Add rows.", param="training_file")
    outcomes.fail(world.db, unprepared.task, preparation.PREPARATION, error)

    refused = world.job(job.id)
    assert (refused.state, refused.reason) == (JobState.FAILED, EndReason.USER_ERROR)
    assert refused.error == error.as_job_error()


def test_preparation_is_leased_to_one_worker_and_can_be_released(world: World) -> None:
    job = world.submit()
    first = begin_preparation(world.db, "w1")
    assert first is not None
    assert begin_preparation(world.db, "w2") is None

    error = ErrorText(code="storage_unavailable", message="The store does not answer.", remedy="")
    outcomes.release(world.db, first.task, preparation.PREPARATION, error, wait_seconds=5)

    assert begin_preparation(world.db, "w2") is None
    world.clock.advance(6)
    second = begin_preparation(world.db, "w2")
    assert second is not None
    assert second.task.subject == job.id


@pytest.mark.parametrize(("num_steps", "num_warnings"), [(39, 1), (40, 0)])
def test_job_without_a_timely_evaluation_trains_with_a_warning(world: World, num_steps: int, num_warnings: int) -> None:
    job = world.submit(validation_file=world.file(), evaluation={"every_steps": 40, "keep": "best"})
    unprepared = begin_preparation(world.db, "w1")
    assert unprepared is not None

    preparation.finish(world.db, unprepared.task, num_steps=num_steps)

    warnings = [event.message for event in world.events(job.id) if event.level == "warn"]
    assert [f"the job has at most {num_steps} steps" in message for message in warnings] == [True] * num_warnings
    assert all("keep its last weights" in message for message in warnings)
    assert world.job(job.id).state == JobState.QUEUED


def test_canceling_invalidates_the_preparation_lease(world: World) -> None:
    job = world.submit()
    unprepared = begin_preparation(world.db, "w1")
    assert unprepared is not None

    commands.cancel(world.db, **world.of(job.id))

    assert not task_queue.renew(world.db, unprepared.task, lease_seconds=LEASE)
    with pytest.raises(StaleClaim):
        preparation.finish(world.db, unprepared.task, num_steps=1)


def test_preparation_and_training_claims_are_not_interchangeable(world: World) -> None:
    running = world.running()
    world.submit()
    preparing = begin_preparation(world.db, "w1")
    assert preparing is not None

    for write in (
        lambda: world.complete(preparing.task.claim_id),
        lambda: claims.end(world.db, preparing.task.claim_id, reason=EndReason.DRAINED, detail=""),
        lambda: recording.record_progress(world.db, preparing.task.claim_id, {}),
        lambda: preparation.finish(world.db, replace(preparing.task, claim_id=running.claim_id), num_steps=1),
        lambda: outcomes.release(world.db, replace(preparing.task, claim_id=running.claim_id), preparation.PREPARATION),
    ):
        with pytest.raises(StaleClaim):
            write()

    assert world.job(running.job.id).state == JobState.RUNNING
    assert world.job(preparing.task.subject).state == JobState.VALIDATING_FILES


def test_poll_without_work_does_not_wait_for_a_writer(world: World) -> None:
    world.worker()

    with world.db.write():
        assert begin_preparation(world.db, "w1") is None
        assert try_claim(world.db, TaskKind.IMPORT) is None


def test_warning_about_few_steps_uses_the_number_of_usable_rows(world: World) -> None:
    job = world.submit(hyperparameters={"batch_size": 4})
    unprepared = begin_preparation(world.db, "w1")
    assert unprepared is not None
    key, digest = unprepared.files.train_key, unprepared.files.training.digest
    world.put_tokens(key, file_digest=digest, artifact=manifest("tokens", kind="tokens"), report={"usable_rows": 2})

    preparation.finish(world.db, unprepared.task, num_steps=2)

    events = world.events(job.id)
    (warning,) = [event.message for event in events if event.level == "warn"]
    assert "Set n_epochs to 59, " in warning, "59 epochs of 2 rows are 30 batches of 4 rows"
