"""Faults of jobs and requests of users: jobs that crash trainers, ruined weights, cancels at critical moments."""

from __future__ import annotations

import time
from typing import Any

from catalog.errors import Conflict
from catalog.fleet import cordons, workers
from catalog.jobs import commands
from catalog.lifecycle import queue_position
from catalog.states import EndReason, JobState
from catalog.tables.fleet import Worker
from qa.chaos.environment import DATABASES, fault
from qa.chaos.service import FaultSite
from tests.worker_site import wait_until

FREE_SECONDS = 30.0
"""A guarantee: the time from a cancel request until the device is free."""
TO_NAN: dict[str, Any] = {
    "lora": {"rank": 1, "alpha": 1e6, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "optimizer": {
        **{"type": "sgd", "learning_rate": 1.0, "lora_plus_ratio": 1e6, "momentum": 0.9, "max_grad_norm": None},
    },
}
"""Three consecutive matrices with no norm between them: their output is infinite."""


@fault("job-poison", "a job that crashes its trainer each time", promise="quarantined with evidence; others continue")
def poison(site: FaultSite) -> str:
    """The trainer dies at the job's seventh step, each time. Other jobs of five steps train with it and after it."""
    poison = site.submit_small()
    beside = [site.submit_small(max_steps=5, checkpoint_every_steps=1000) for _ in range(2)]
    site.start_worker(FAILPOINT="step_7:kill")
    site.wait_for_end(poison, *beside)
    after = site.submit_small(max_steps=5, checkpoint_every_steps=1000)

    site.wait_for_success(*beside, after, is_small=False)

    job = site.job(poison)
    assert (job.state, (job.error or {}).get("code")) == (JobState.FAILED, "quarantined"), job.error
    site.assert_attempts(poison, *[EndReason.TRAINER_CRASHED] * 3)
    assert len((job.error or {})["evidence"]) == 3
    return "quarantined after 3 attempts, with evidence; 3 others succeeded"


@fault(
    "node-bad",
    "a node whose trainers all die",
    promise="cordoned, without a quarantined job; the jobs succeed elsewhere",
    environment={"LORRY_MAX_JOBS_PER_TRAINER": "1"},
)
def break_node(site: FaultSite) -> str:
    """Every trainer of a worker dies while it loads. The worker takes one job at a time, and three wait. An operator
    replaces it with a working one."""
    waiting = [site.submit_small() for _ in range(3)]
    bad = site.start_worker(FAILPOINT="loading:kill")
    site.wait_until(lambda: _cordoned(site))
    (cordoned,) = _cordoned(site)
    ends = [site.reasons(job_id) for job_id in waiting]
    assert (cordoned.cordon or {})["by"] == "service"
    assert all(end == EndReason.TRAINER_CRASHED for told in ends for end in told)
    assert [site.job(job_id).state for job_id in waiting] == [JobState.QUEUED] * 3, ends

    bad.terminate()
    site.assert_exits(bad)
    cordons.uncordon(site.db, cordoned.id)
    site.finish(*waiting)
    return f"cordoned after {sum(map(len, ends))} failures of 3 jobs; then elsewhere: {site.attempts_text(waiting[0])}"


def _cordoned(site: FaultSite) -> list[Worker]:
    return [worker for worker in workers.list_workers(site.db) if worker.cordon is not None]


@fault(
    "job-diverged",
    "a job that ruins its own weights, to a loss of NaN or infinity",
    promise="the right reason; packmates unaffected",
)
def diverge(site: FaultSite) -> str:
    good = site.submit_small()
    bad = site.submit_small(**TO_NAN)
    site.start_worker(FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_for_step(15, good)
    site.wait_until(lambda: site.job(bad).state in (JobState.RUNNING, JobState.FAILED))
    site.gate("go").touch()

    site.wait_for_success(good)
    site.wait_for_end(bad)

    assert site.job(bad).state == JobState.FAILED, site.attempts_text(bad)
    site.assert_attempts(bad, EndReason.DIVERGED)
    assert "is not finite" in site.attempts(bad)[0].detail, site.attempts(bad)[0].detail
    assert site.attempts(bad)[0].trainer_id == site.attempts(good)[0].trainer_id, "they did not train together"
    return f"“{site.attempts(bad)[0].detail}” Its packmate's bytes are those of a job without packmates"


@fault("cancel-training", "cancel during training", promise="device free within 30 s")
def cancel_in_training(site: FaultSite) -> str:
    """The device is free once the trainer, which has no other job, has exited."""
    job_id, worker = site.train_to_step_15()
    asked_at = time.monotonic()
    site.cancel(job_id)

    def is_free() -> bool:
        is_ended = site.job(job_id).state == JobState.CANCELLED
        if not is_ended and site.has_unread_message("cancel"):
            site.gate("go").touch()
        return is_ended and not site.trainers_of(worker)

    late = f"the device was not free {FREE_SECONDS:.0f} s after the request"
    wait_until(is_free, message=lambda: late, seconds=FREE_SECONDS)
    seconds = time.monotonic() - asked_at

    site.gate("go").touch()
    next_job = site.submit_small()
    site.wait_for_success(next_job)
    return f"cancelled, and the device free, {seconds:.1f} s after the request; the next job succeeded"


@fault("cancel-waiting", "cancel in validating_files, queued and paused", promise="at once; nothing trains")
def cancel_waiting(site: FaultSite) -> str:
    new, queued, paused = (site.submit_small() for _ in range(3))
    site.cancel(new)
    assert site.job(new).state == JobState.CANCELLED
    for job_id in (queued, paused):  # else they would be claimed before they could be cancelled
        queue_position.hold(site.db, project_id=site.caller.project_id, job_id=job_id)
    site.start_worker()
    site.wait_until(lambda: site.job(queued).state == site.job(paused).state == JobState.QUEUED)
    commands.pause(site.db, project_id=site.caller.project_id, job_id=paused)
    assert site.job(paused).state == JobState.PAUSED
    for job_id in (queued, paused):
        site.cancel(job_id)
        assert site.job(job_id).state == JobState.CANCELLED
    left = site.submit_small()
    site.wait_for_success(left)
    assert [len(site.attempts(job_id)) for job_id in (new, queued, paused)] == [0, 0, 0]
    return "validating_files, queued and paused: cancelled at once, never claimed"


@fault(
    "cancel-racing",
    "cancel when the adapter is stored and the completing transaction is about to begin",
    promise="one winner: the completion",
    databases=DATABASES,
)
def cancel_in_completion(site: FaultSite) -> str:
    """A finished job can't be cancelled."""
    job_id = site.submit_small()
    site.start_worker(FAILPOINT=f"before_complete:wait={site.gate('go')}")
    site.wait_for_step(30, job_id)
    site.wait_for_file("jobs/*/adapter/adapter_model.safetensors")
    site.wait_until(lambda: (site.job(job_id).progress or {}).get("step") == 30)
    site.cancel(job_id)
    site.wait_seconds(2 * site.settings.heartbeat_seconds)
    site.gate("go").touch()

    site.wait_for_end(job_id)

    assert site.job(job_id).state == JobState.SUCCEEDED, site.job(job_id).state
    assert len(site.adapters()) == 1
    try:
        site.cancel(job_id)
    except Conflict:
        return "the completion won, with one adapter"
    raise AssertionError("a final job was cancelled")
