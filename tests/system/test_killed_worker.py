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
from tests.worker_site import SHORT_LEASE, WorkerSite, is_gone_in_time, worker_site


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
