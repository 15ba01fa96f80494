"""A job ends once, with the same bytes, whichever process is killed at whichever time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from catalog.jobs import commands
from catalog.states import EndReason, JobState
from tests.worker_site import SHORT_LEASE, WAIT_SECONDS, WorkerSite, is_gone, is_gone_in_time, worker_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[WorkerSite]:
    with worker_site(tmp_path, **SHORT_LEASE) as site:
        yield site


def small_job(**fields: Any) -> dict[str, Any]:
    hyperparameters = {"batch_size": 4}
    return {"hyperparameters": hyperparameters, "max_steps": 30, "checkpoint_every_steps": 10, **fields}


def test_the_job_of_a_killed_worker_ends_with_the_same_bytes_on_another(site: WorkerSite) -> None:
    rows, validation = site.upload(60), site.upload(12, seed=5)
    disturbed = site.submit(rows, validation_file=validation, **small_job())
    worker = site.start_worker(FAILPOINT="step_25:hang")
    site.wait_until(lambda: site.checkpoint_steps(disturbed) == [10, 20])
    trainer = psutil.Process(site.trainer_pid(disturbed))

    worker.kill()

    assert is_gone_in_time(trainer)
    undisturbed = site.submit(rows, validation_file=validation, **small_job())
    site.start_worker()
    site.wait_for_end(disturbed, undisturbed)
    assert site.job(disturbed).state == JobState.SUCCEEDED, site.log()
    assert site.reasons(disturbed) == [EndReason.INFRA_LOST, EndReason.COMPLETED]
    assert site.attempts(disturbed)[1].resumed_from_step == 20
    assert sorted(adapter.job_id for adapter in site.adapters()) == sorted([undisturbed, disturbed])
    assert site.weights_digest(disturbed) == site.weights_digest(undisturbed)
    assert site.job(disturbed).trained_tokens == site.job(undisturbed).trained_tokens


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", ["after_claim", "uploading", "before_complete", "after_complete"])
def test_a_killed_worker_at_any_stage_leaves_one_adapter(site: WorkerSite, failpoint: str) -> None:
    job_id = site.submit(site.upload(20), **small_job(max_steps=5))
    first = site.start_worker(FAILPOINT=f"{failpoint}:kill")
    assert first.wait(WAIT_SECONDS) == -signal.SIGKILL, site.log()

    site.start_worker()
    site.wait_for_end(job_id)

    assert site.job(job_id).state == JobState.SUCCEEDED, site.log()
    assert [adapter.job_id for adapter in site.adapters()] == [job_id]
    assert len(site.reasons(job_id)) == (1 if failpoint == "after_complete" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", ["in_checkpoint:kill", "step_3:raise"])
def test_a_job_whose_trainer_dies_three_times_without_progress_is_quarantined(site: WorkerSite, failpoint: str) -> None:
    job_id = site.submit(site.upload(20), **small_job(max_steps=8, checkpoint_every_steps=5))
    site.start_worker(FAILPOINT=failpoint)

    site.wait_for_end(job_id)

    job = site.job(job_id)
    assert job.state == JobState.FAILED
    assert site.reasons(job_id) == [EndReason.TRAINER_CRASHED] * 3
    assert job.error is not None
    assert job.error["code"] == "quarantined"
    assert site.adapters() == []


def test_resumed_equals_uninterrupted_after_a_kill_among_joins_and_leaves(site: WorkerSite) -> None:
    rows, other_rows, validation = site.upload(60), site.upload(40, seed=3), site.upload(12, seed=5)
    long = small_job(max_steps=40, checkpoint_every_steps=6)
    kinds: dict[str, dict[str, Any]] = {
        "stays": {**long, "lora": {"rank": 8, "dropout": 0.1}, "seed": 1},
        "leaves": {**small_job(max_steps=3), "lora": {"rank": 4}, "seed": 2},
        "joins": {**long, "lora": {"rank": 16}, "seed": 3, "validation_file": validation},
    }
    files = {"stays": rows, "leaves": other_rows, "joins": other_rows}
    solo = {name: site.submit(files[name], **fields) for name, fields in kinds.items()}
    site.work_until_done(LORRY_MAX_JOBS_PER_TRAINER="1")
    packed = {name: site.submit(files[name], **kinds[name]) for name in ("stays", "leaves")}
    cancelled = site.submit(rows, **long, lora={"rank": 2}, seed=4)
    site.start_worker(FAILPOINT=f"step_12:wait={site.gate('join')},step_24:wait={site.gate('kill')}")
    site.wait_for_end(packed["leaves"])
    site.wait_for_step(12, packed["stays"], cancelled)  # from here on the trainer reads no message until the gate opens
    packed["joins"] = site.submit(files["joins"], **kinds["joins"])
    site.wait_until(
        lambda: site.job(cancelled).state == JobState.RUNNING
    )  # otherwise it is cancelled immediately, without a message
    commands.cancel(site.db, project_id=site.caller.project_id, job_id=cancelled)
    site.wait_for_message("admit")
    site.wait_for_message("cancel")
    site.gate("join").touch()
    site.wait_for_step(24, packed["stays"])
    site.wait_until(lambda: site.checkpoint_steps(packed["joins"]))
    os.kill(site.trainer_pid(packed["stays"]), signal.SIGKILL)
    site.gate("kill").touch()

    site.wait_for_end(*packed.values(), cancelled)

    assert site.job(cancelled).state == JobState.CANCELLED
    for name in ("stays", "joins"):
        assert site.reasons(packed[name]) == [EndReason.TRAINER_CRASHED, EndReason.COMPLETED], site.log()
        assert site.attempts(packed[name])[1].resumed_from_step > 0
    for name in kinds:
        assert site.weights_digest(packed[name]) == site.weights_digest(solo[name]), name


@pytest.mark.slow
def test_resumed_equals_uninterrupted_after_a_drain_that_is_not_counted(site: WorkerSite) -> None:
    rows = site.upload(40)
    drained = site.submit(rows, **small_job(checkpoint_every_steps=1000))
    worker = site.start_worker(FAILPOINT=f"step_15:wait={site.gate('drain')}")
    site.wait_for_step(15, drained)
    worker.terminate()
    site.wait_for_message("drain")

    site.gate("drain").touch()

    assert worker.wait(WAIT_SECONDS) == 0, site.log()
    assert site.job(drained).state == JobState.QUEUED
    assert site.job(drained).counted_attempts == 0
    left_alone = site.submit(rows, **small_job())
    site.work_until_done()
    assert site.reasons(drained) == [EndReason.DRAINED, EndReason.COMPLETED]
    assert site.attempts(drained)[1].resumed_from_step == 15
    assert site.weights_digest(drained) == site.weights_digest(left_alone)


@pytest.mark.slow
def test_a_worker_that_was_stopped_for_two_leases_writes_nothing_afterwards(site: WorkerSite) -> None:
    job_id = site.submit(site.upload(20), **small_job(max_steps=20))
    stopped = site.start_worker(FAILPOINT="step_15:hang")
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10])
    trainer = psutil.Process(site.trainer_pid(job_id))
    site.stop_between_writes(stopped)
    site.start_worker()
    site.wait_for_end(job_id)
    assert is_gone(trainer), "the trainer of a silent worker exits on its own"
    events_before = [event.seq for event in site.events(job_id)]

    stopped.send_signal(signal.SIGCONT)
    stopped.terminate()

    assert stopped.wait(WAIT_SECONDS) == 0, site.log()
    assert [event.seq for event in site.events(job_id)] == events_before
    assert site.reasons(job_id) == [EndReason.INFRA_LOST, EndReason.COMPLETED]
    assert len(site.adapters()) == 1
