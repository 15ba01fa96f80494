"""Out-of-memory attempts: smaller ticks, then a trainer of its own with single slices, then failure."""

from __future__ import annotations

import pytest

from catalog.lifecycle import failures, recording
from catalog.lifecycle.outcomes import decide
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.states import MAX_COUNTED_ATTEMPTS, EndReason, JobState, Verb
from tests.catalog.lifecycle.test_load_failures import fail_to_load
from tests.catalog.queue.test_sharded_claims import on, queued_large
from tests.catalog.world import World, manifest

OOM = sorted(failures.OF_MEMORY)


def short(world: World, claim: Claim, reason: EndReason = EndReason.CUDA_OOM) -> JobState:
    state = claims.end(world.db, claim.claim_id, reason=reason, detail="The GPU ran out of memory.")
    world.clock.advance(31)
    return state


def last_message(world: World, job_id: str) -> str:
    return world.events(job_id)[-1].message


def rung(world: World, job_id: str) -> int:
    return failures.memory_rung(world.db, world.job(job_id))


@pytest.mark.parametrize("reason", OOM)
def test_out_of_memory_leads_to_smaller_ticks_then_isolation_then_failure(world: World, reason: EndReason) -> None:
    job, mate = world.queued(), world.queued()
    assert rung(world, job.id) == 0

    seen: list[tuple[int, int, str]] = []
    for _ in range(2):
        claimed = {claim.job.id: claim for claim in world.claim()}
        short(world, claimed[job.id], reason)
        seen.append((len(claimed), rung(world, job.id), last_message(world, job.id)))
        if mate.id in claimed:
            claims.end(world.db, claimed[mate.id].claim_id, reason=EndReason.DRAINED, detail="")
    claimed = world.claim()
    while claimed[0].job.id != job.id:
        world.complete(claimed[0].claim_id)
        claimed = world.claim()

    assert [number for number, _, _ in seen] == [2, 2]
    assert [step for _, step, _ in seen] == [1, 2]
    assert [failures.SMALLER in seen[0][2], failures.SMALLEST in seen[1][2]] == [True, True]
    assert [claim.job.id for claim in claimed] == [job.id], "the job must train alone"
    assert short(world, claimed[0], reason) is JobState.FAILED
    assert world.job(mate.id).state != JobState.FAILED


def test_failed_job_reports_the_devices_that_would_fit(world: World) -> None:
    capacity = on(world, 2, 17)
    job = queued_large(world)

    for _ in range(MAX_COUNTED_ATTEMPTS):
        (claim,) = world.claim(capacity=capacity)
        short(world, claim)

    assert world.job(job.id).state == JobState.FAILED
    error = world.job(job.id).error or {}
    assert error["code"] == "quarantined"
    assert len(error["evidence"]) == MAX_COUNTED_ATTEMPTS
    assert "trained without other jobs and computed one micro-batch" in error["message"]
    assert "estimated to need about 16.4 GB, and the smallest of 2 devices has 17.0 GB" in error["message"]
    assert "It would fit on one GPU with 24 GB, or on 2 GPUs " not in error["message"], "the size that failed"
    assert "It would fit on one GPU with " in error["message"]


def test_suggested_gpu_exceeds_the_memory_that_was_insufficient(world: World) -> None:
    """The device has 50 GB although about 20 GB were estimated, so a GPU of 48 GB is not suggested."""
    capacity = on(world, 1, 50)
    job = queued_large(world)

    for _ in range(MAX_COUNTED_ATTEMPTS):
        (claim,) = world.claim(capacity=capacity)
        short(world, claim)

    message = (world.job(job.id).error or {})["message"]
    assert "It would fit on one GPU with 80 GB" in message
    assert "one GPU with 48 GB" not in message


@pytest.mark.parametrize("reason", OOM)
def test_crashes_do_not_skip_the_smallest_tick_before_failure(world: World, reason: EndReason) -> None:
    job = world.queued()
    states: list[JobState] = []
    for ended in (EndReason.TRAINER_CRASHED, EndReason.TRAINER_CRASHED, reason, reason, reason):
        (claim,) = world.claim()
        states.append(short(world, claim, ended))

    assert states == [JobState.QUEUED] * 4 + [JobState.FAILED]
    assert world.job(job.id).state == JobState.FAILED


def test_new_checkpoint_resets_single_slices_but_not_smaller_ticks(world: World) -> None:
    claim = world.running()
    short(world, claim)
    (claim,) = world.claim()
    short(world, claim)
    assert rung(world, claim.job.id) == 2

    (claim,) = world.claim()
    recording.record_checkpoint(world.db, claim.claim_id, step=5, artifact=manifest("c5", kind="checkpoint"))
    claims.end(world.db, claim.claim_id, reason=EndReason.DRAINED, detail="")

    assert rung(world, claim.job.id) == 1


def test_out_of_memory_while_loading_the_base_does_not_shrink_ticks(world: World) -> None:
    world.worker("w1")
    world.worker("w2")
    job = world.queued()

    fail_to_load(world, "w1", "t1")
    after_one = (rung(world, job.id), last_message(world, job.id))
    for number in range(1, MAX_COUNTED_ATTEMPTS + 1):
        fail_to_load(world, "w2", f"t{number + 1}")

    assert after_one[0] == 0
    assert failures.SMALLER not in after_one[1]
    ended = world.job(job.id)
    assert ended.state == JobState.FAILED, "the job is retried although no worker can load its base model"
    assert "one slice" not in (ended.error or {})["message"]


@pytest.mark.parametrize("counted", range(MAX_COUNTED_ATTEMPTS))
def test_out_of_memory_attempts_are_bounded(counted: int) -> None:
    verdict = decide(
        EndReason.CUDA_OOM,
        cancel_requested=False,
        pause_requested=False,
        counted_attempts=counted,
        num_shortages=failures.MAX_OUT_OF_MEMORY + counted,
    )

    assert verdict.verb is (Verb.FAIL if counted == MAX_COUNTED_ATTEMPTS - 1 else Verb.REQUEUE)
