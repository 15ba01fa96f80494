"""Faults of jobs, and requests of users: jobs that crash trainers, ruined weights, cancels at every moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from catalog.errors import Conflict
from catalog.fleet import cordons, workers
from catalog.jobs import commands
from catalog.lifecycle import queue_position
from catalog.states import EndReason, JobState
from catalog.tables.fleet import Worker
from qa.chaos.scenario import Row
from qa.chaos.service import FaultSite
from tests.worker_site import wait_until

FREE_SECONDS = 30.0
"""A guarantee: the time from a cancel request until the device is free."""
LARGE: dict[str, Any] = {"rank": 1, "alpha": 1e6}
FAST: dict[str, Any] = {"learning_rate": 1.0, "lora_plus_ratio": 1e6}
TO_ZERO = {"lora": LARGE, "optimizer": FAST}
"""The output of the weights is so large that its squares in a norm are infinite, and the normalized output is zero."""
TO_NAN = {
    "lora": {**LARGE, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "optimizer": {**FAST, "type": "sgd", "momentum": 0.9, "max_grad_norm": None},
}
"""Three consecutive matrices with no norm between them: their output is infinite."""


def _poison(site: FaultSite) -> str:
    """The trainer dies at the job's seventh step, each time. Other jobs of five steps train with it and after it."""
    poison = site.submit_small()
    beside = [site.submit_small(max_steps=5, checkpoint_every_steps=1000) for _ in range(2)]
    site.start_worker(FAILPOINT="step_7:kill")
    site.wait_for_end(poison, *beside)
    after = site.submit_small(max_steps=5, checkpoint_every_steps=1000)

    site.wait_for_success(*beside, after, is_small=False)

    job = site.job(poison)
    assert (job.state, (job.error or {}).get("code")) == (JobState.FAILED, "quarantined"), job.error
    assert site.reasons(poison) == [EndReason.TRAINER_CRASHED] * 3, site.attempts_text(poison)
    assert len((job.error or {})["evidence"]) == 3
    return "quarantined after 3 attempts, with evidence; 3 others succeeded"


def _bad_node(site: FaultSite) -> str:
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
    assert bad.wait(site.patience_seconds) == 0
    cordons.uncordon(site.db, cordoned.id)
    site.finish(*waiting)
    return f"cordoned after {sum(map(len, ends))} failures of 3 jobs; then elsewhere: {site.attempts_text(waiting[0])}"


def _cordoned(site: FaultSite) -> list[Worker]:
    return [worker for worker in workers.list_workers(site.db) if worker.cordon is not None]


def _diverged(site: FaultSite, *, fields: dict[str, Any], says: str) -> str:
    """The highest allowed learning rate and scale ruin a job's weights. That job fails, and its packmate's bytes are
    those of a job without packmates."""
    good = site.submit_small()
    bad = site.submit_small(**fields)
    site.start_worker(FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_for_step(15, good)
    site.wait_until(lambda: site.job(bad).state in (JobState.RUNNING, JobState.FAILED))
    site.gate("go").touch()

    site.wait_for_success(good)
    site.wait_for_end(bad)

    assert (site.job(bad).state, site.reasons(bad)) == (JobState.FAILED, [EndReason.DIVERGED]), site.attempts_text(bad)
    assert says in site.attempts(bad)[0].detail, site.attempts(bad)[0].detail
    assert site.attempts(bad)[0].trainer_id == site.attempts(good)[0].trainer_id, "they did not train together"
    return f"“{site.attempts(bad)[0].detail}” Its packmate's bytes are those of a job without packmates"


def _cancelled(site: FaultSite, *, failpoint: str, is_there: Callable[[FaultSite, str], None]) -> str:
    """Cancel a job while its trainer waits at a failpoint: in a step until it gets the message, or while it loads. The
    device is free once the trainer, which has no other job, has exited."""
    job_id = site.submit_small()
    worker = site.start_worker(FAILPOINT=f"{failpoint}:wait={site.gate('go')}")
    is_there(site, job_id)
    site.trainer_of(worker)
    asked_at = time.monotonic()
    site.cancel(job_id)

    def is_free() -> bool:
        is_ended = site.job(job_id).state == JobState.CANCELLED
        if not is_ended and site.is_requested("cancel"):
            site.gate("go").touch()
        return is_ended and not site.trainers_of(worker)

    late = f"the device was not free {FREE_SECONDS:.0f} s after the request"
    wait_until(is_free, message=lambda: late, seconds=FREE_SECONDS)
    seconds = time.monotonic() - asked_at

    site.gate("go").touch()
    next_job = site.submit_small()
    site.wait_for_success(next_job)
    return f"cancelled, and the device free, {seconds:.1f} s after the request; the next job succeeded"


def _at_step_15(site: FaultSite, job_id: str) -> None:
    site.wait_for_step(15, job_id)


def _loading(site: FaultSite, job_id: str) -> None:
    site.wait_until(lambda: site.job(job_id).state == JobState.RUNNING)
    site.wait_for_file("trainer.json")


def _cancelled_waiting(site: FaultSite) -> str:
    """Cancel jobs that don't train: before and after the preparation of their files, and paused."""
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


def _cancelled_twice(site: FaultSite, job_id: str) -> None:
    """Check that a finished job can't be cancelled."""
    try:
        site.cancel(job_id)
    except Conflict:
        return
    raise AssertionError("a final job was cancelled")


def _racing(site: FaultSite, *, failpoint: str, wins: JobState) -> str:
    """Cancel a job during its completion."""
    job_id = site.submit_small()
    site.start_worker(FAILPOINT=f"{failpoint}:wait={site.gate('go')}")
    site.wait_for_step(30, job_id)
    site.wait_for_file("jobs/*/adapter/adapter_model.safetensors")
    site.wait_until(lambda: (site.job(job_id).progress or {}).get("step") == 30)
    site.cancel(job_id)
    site.wait_seconds(2 * site.settings.heartbeat_seconds)
    site.gate("go").touch()

    site.wait_for_end(job_id)

    assert site.job(job_id).state == wins, site.job(job_id).state
    assert len(site.adapters()) == (wins == JobState.SUCCEEDED)
    _cancelled_twice(site, job_id)
    return f"{wins.value} won, with {len(site.adapters())} adapters"


def _obeyed_in_time(site: FaultSite) -> str:
    """Cancel a job when one step is left. The request takes effect before that step, so the job does not complete."""
    job_id = site.submit_small()
    site.start_worker(FAILPOINT=f"step_29:wait={site.gate('go')}")
    site.wait_for_step(29, job_id)
    site.cancel(job_id)
    site.wait_for_message("cancel")
    site.gate("go").touch()

    site.wait_for_end(job_id)

    state = site.job(job_id).state
    assert (state, site.reasons(job_id)) == (JobState.CANCELLED, [EndReason.CANCELLED_BY_USER]), state
    assert site.adapters() == []
    _cancelled_twice(site, job_id)
    return "cancelled won at step 29 of 30, with no adapter"


ROWS = (
    Row(
        name="job-poison",
        fault="a job that crashes its trainer each time",
        also="quarantined with evidence; the others continue",
        act=_poison,
    ),
    Row(
        name="node-bad",
        fault="a node whose trainers all die",
        also="cordoned, without a quarantined job; the jobs succeed elsewhere",
        act=_bad_node,
        environment={"LORRY_MAX_JOBS_PER_TRAINER": "1"},
    ),
    Row(
        name="job-diverged",
        fault="a job that ruins its own weights, to a gradient of zero",
        also="the right reason; packmates unaffected",
        act=partial(_diverged, fields=TO_ZERO, says="exactly zero"),
    ),
    Row(
        name="job-diverged-nan",
        fault="a job that ruins its own weights, to a loss of NaN or infinity",
        also="the right reason; packmates unaffected",
        act=partial(_diverged, fields=TO_NAN, says="is not finite"),
    ),
    Row(
        name="cancel-waiting",
        fault="cancel in validating_files, queued and paused",
        also="at once; nothing trains",
        act=_cancelled_waiting,
    ),
    Row(
        name="cancel-loading",
        fault="cancel while the base model is being loaded",
        also="device free within 30 s",
        act=partial(_cancelled, failpoint="loading", is_there=_loading),
    ),
    Row(
        name="cancel-training",
        fault="cancel during training",
        also="device free within 30 s",
        act=partial(_cancelled, failpoint="step_15", is_there=_at_step_15),
    ),
    Row(
        name="cancel-racing",
        fault="cancel when the adapter is stored and the completing transaction is about to begin",
        also="one winner: the completion",
        act=partial(_racing, failpoint="before_complete", wins=JobState.SUCCEEDED),
    ),
    Row(
        name="cancel-racing-first",
        fault="cancel when one step is left, delivered before the adapter is exported",
        also="one winner: the cancel",
        act=_obeyed_in_time,
    ),
)
