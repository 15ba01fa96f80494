"""Faults of workers, trainers and the API server: killed, suspended, hanging, out of memory, asked to shut down."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx
from sqlalchemy import select

from catalog.history import job_logs
from catalog.pepper import Pepper
from catalog.states import EndReason, JobState
from catalog.tables.jobs import Job
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint
from catalog.webhooks import endpoints
from qa.chaos.environment import DATABASES, POSTGRESQL, fault
from qa.chaos.service import NUM_ROWS, PATIENCE_SECONDS, SMALL, FaultSite
from tests.api.hook_receiver import Answer, Received, receiving
from tests.services.memory_group import memory_group
from tests.worker_site import PEPPER, is_gone

RESUMES = "its trainer is gone within a second; the job resumes at most one checkpoint back, with the same bytes"
LOST_ONCE = (EndReason.INFRA_LOST, EndReason.COMPLETED)
GRACE_SECONDS = 90.0
"""A guarantee: systemd and Compose kill a worker that takes longer to shut down."""
HEADROOM_BYTES = 64 * 2**20
"""Enough for the next ticks of a trainer, but less than it suddenly allocates."""
STANDS = "in _fail\n"
"""A stack of a trainer that hangs at a failpoint has this line."""


@fault(
    "worker-killed-after-claim",
    "kill -9 of the worker after it has claimed",
    promise=RESUMES,
    given={"failpoint": "after_claim", "reasons": LOST_ONCE, "has_trainer": False},
    databases=DATABASES,
)
@fault(
    "worker-killed-storing",
    "kill -9 of the worker while it stores a checkpoint",
    promise=RESUMES,
    given={"failpoint": "uploading", "reasons": LOST_ONCE},
    databases=DATABASES,
)
@fault(
    "worker-killed-in-complete",
    "kill -9 of the worker in the completing transaction",
    promise=RESUMES,
    given={"failpoint": "in_complete", "reasons": LOST_ONCE},
    databases=DATABASES,
)
@fault(
    "worker-killed-after-complete",
    "kill -9 of the worker after the completing commit",
    promise="its trainer is gone within a second; nothing runs again",
    given={"failpoint": "after_complete", "reasons": (EndReason.COMPLETED,)},
    databases=DATABASES,
)
def kill_worker_at(site: FaultSite, *, failpoint: str, reasons: tuple[EndReason, ...], has_trainer: bool = True) -> str:
    job_id = site.submit_small()
    site.assert_exits(site.start_worker(FAILPOINT=f"{failpoint}:kill"), status=-signal.SIGKILL)
    seconds = site.seconds_until_alone()
    assert site.has_seen_trainer() == has_trainer
    return _finish_killed(site, job_id, seconds, reasons)


@fault("worker-killed-at-step", "kill -9 of the worker at step 25 of 30", promise=RESUMES, databases=DATABASES)
def kill_worker_at_step_25(site: FaultSite) -> str:
    job_id = site.submit_small()
    worker = site.start_worker(FAILPOINT="step_25:hang")
    trainer = site.trainer_of(worker)
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10, 20])
    site.wait_for_step(25, job_id)
    assert trainer.is_running()
    worker.kill()
    worker.wait()
    return _finish_killed(site, job_id, site.seconds_until_alone(), LOST_ONCE)


def _finish_killed(site: FaultSite, job_id: str, seconds: float, reasons: tuple[EndReason, ...]) -> str:
    """Finish the job, and check that each attempt resumed from the newest checkpoint that was recorded when the worker
    was lost."""
    site.finish(job_id)
    site.assert_attempts(job_id, *reasons)
    told = [event for event in site.events(job_id) if event.message.startswith("Checkpoint created")]
    for lost, after in pairwise(site.attempts(job_id)):
        there = [event.data["step"] for event in told if event.data and event.created_at <= lost.ended_at]
        assert (after.resumed_from_step or 0) == max(there, default=0), site.attempts_text(job_id)
    return f"its processes gone {seconds:.1f} s later; {site.attempts_text(job_id)}"


@fault(
    "worker-stopped",
    "SIGSTOP of a worker for two leases, then SIGCONT",
    promise="its writes are refused, and its trainer exits without it",
    databases=DATABASES,
)
def stop_worker_for_two_leases(site: FaultSite) -> str:
    job_id, stopped = site.train_to_step_15()
    trainer = site.trainer_of(stopped)
    site.stop_between_writes(stopped)
    site.wait_seconds(2 * site.settings.lease_seconds)
    assert is_gone(trainer), "the trainer of a suspended worker still runs"
    return _finish_without(site, job_id, stopped)


@fault(
    "worker-stopped-writing",
    "SIGSTOP of a worker in the completing transaction, then SIGCONT",
    promise="its row is unlocked after half a minute; its writes are refused",
    databases=POSTGRESQL,
)
def stop_worker_amid_its_write(site: FaultSite) -> str:
    job_id = site.submit_small()
    stopped = site.start_worker(FAILPOINT=f"in_complete:wait={site.gate('commit')}")
    site.wait_for_file("jobs/*/adapter/adapter_model.safetensors")
    site.wait_until(site.is_anybody_writing)
    stopped.send_signal(signal.SIGSTOP)
    return _finish_without(site, job_id, stopped)


def _finish_without(site: FaultSite, job_id: str, stopped: subprocess.Popen[bytes]) -> str:
    """Finish the job with another worker, then resume the suspended one, which must not write."""
    site.finish(job_id)
    before = [event.seq for event in site.events(job_id)]
    site.gate("commit").touch()
    stopped.send_signal(signal.SIGCONT)
    site.wait_seconds(2 * site.settings.heartbeat_seconds)
    stopped.terminate()

    site.assert_exits(stopped)
    assert [event.seq for event in site.events(job_id)] == before, "it wrote after it had lost its claim"
    site.assert_attempts(job_id, *LOST_ONCE)
    return f"{site.attempts_text(job_id)}; the resumed worker wrote nothing and exited with status 0"


@fault(
    "all-sigterm",
    "SIGTERM of worker and API server during training",
    promise="drained within the grace time; the attempt does not count",
    databases=DATABASES,
)
def terminate_worker_and_api(site: FaultSite) -> str:
    api = site.start_api()
    job_id, worker = site.train_to_step_15()
    for process in (api, worker):
        process.terminate()
    asked_at = time.monotonic()
    site.wait_for_message("drain")
    site.gate("go").touch()

    for process in (api, worker):
        site.assert_exits(process)
    seconds = time.monotonic() - asked_at
    assert seconds < GRACE_SECONDS, f"they took {seconds:.0f} s to exit"
    job = site.job(job_id)
    assert (job.state, job.counted_attempts, job.claim_id) == (JobState.QUEUED, 0, None)
    site.finish(job_id)
    site.assert_attempts(job_id, EndReason.DRAINED, EndReason.COMPLETED, resumed_from=15)
    return f"gone {seconds:.1f} s later; {site.attempts_text(job_id)}; the first attempt does not count"


@fault("trainer-killed", "kill -9 of the trainer only", promise="the right reason, the job resumes")
def kill_trainer(site: FaultSite) -> str:
    job_id, worker = site.train_to_step_15()
    site.trainer_of(worker).kill()
    site.gate("go").touch()

    site.wait_for_success(job_id)

    site.assert_attempts(job_id, EndReason.TRAINER_CRASHED, EndReason.COMPLETED, resumed_from=10)
    return f"{site.attempts_text(job_id)}: {site.attempts(job_id)[0].detail}"


@fault(
    "trainer-oom-killed",
    "the kernel kills the trainer because its cgroup is out of memory",
    promise="the right reason, the job resumes; the worker keeps running",
)
def exhaust_memory(site: FaultSite) -> str:
    """Run worker and trainer in a cgroup, and set its limit during training. The trainer then allocates more."""
    job_id = site.submit_small()
    with memory_group() as group:
        argv = [sys.executable, "-m", "worker.entrypoints.loop", "--device", "cpu"]
        failpoint = f"step_15:wait={site.gate('go')},step_15:take={8 * HEADROOM_BYTES}"
        worker = site.start(group.argv(argv), FAILPOINT=failpoint)
        site.wait_until(lambda: site.checkpoint_steps(job_id) == [10])
        site.wait_for_step(15, job_id)
        group.limit(group.used_bytes() + HEADROOM_BYTES)
        site.gate("go").touch()
        site.wait_until(lambda: site.reasons(job_id)[:1] == [EndReason.HOST_OOM])
        group.limit(None)

        site.wait_for_success(job_id)

        site.assert_attempts(job_id, EndReason.HOST_OOM, EndReason.COMPLETED, resumed_from=10)
        worker.terminate()
        site.assert_exits(worker)
    return f"{site.attempts_text(job_id)}: {site.attempts(job_id)[0].detail}"


@fault(
    "trainer-hang",
    "the trainer hangs during training",
    promise="the progress timeout kills it, with its stacks in the job's log; the job resumes",
)
def hang_trainer(site: FaultSite) -> str:
    """The time limit of the worker is reduced to 5 s."""
    job_id = site.submit_small()
    worker = site.start([sys.executable, "-m", "qa.chaos.impatient_worker"], FAILPOINT="step_15:hang")
    site.wait_until(lambda: site.reasons(job_id)[:1] == [EndReason.TIMEOUT])
    worker.terminate()
    site.assert_exits(worker)

    site.finish(job_id)

    assert site.attempts(job_id)[-1].resumed_from_step == 10, site.attempts_text(job_id)
    given = {"project_id": site.caller.project_id, "job_id": job_id, "attempt": 1, "limit": 1000}
    log = "\n".join(line.text for line in job_logs.lines(site.db, site.store, **given).items)
    assert STANDS in log.partition("Stacks of its threads:")[2], log
    return f"{site.attempts_text(job_id)}: {site.attempts(job_id)[0].detail} Its stacks are in the job's log"


@fault(
    "api-killed-before-commit",
    "kill -9 of the API server before the commit of a submission",
    promise="no job; the retry creates one",
    given={"failpoint": "submit_before_commit", "num_jobs": 0},
    databases=DATABASES,
)
@fault(
    "api-killed-after-commit",
    "kill -9 of the API server after the commit of a submission and before the response",
    promise="the retry returns the same job",
    given={"failpoint": "submit_after_commit", "num_jobs": 1},
    databases=DATABASES,
)
def kill_api_in_submission(site: FaultSite, *, failpoint: str, num_jobs: int) -> str:
    file_id, key = site.upload(NUM_ROWS), "submission-1"
    api = site.start_api(FAILPOINT=f"{failpoint}:kill")
    try:
        site.post_job(file_id, idempotency_key=key, **SMALL)
    except httpx.TransportError as error:
        lost = type(error).__name__
    else:
        raise AssertionError("there was a response")
    site.assert_exits(api, status=-signal.SIGKILL)
    there = _job_ids(site)
    assert len(there) == num_jobs, f"{len(there)} jobs were left"

    site.start_api()
    answers = [site.post_job(file_id, idempotency_key=key, **SMALL) for _ in range(2)]

    named = {answer.json()["id"] for answer in answers}
    assert named == set(_job_ids(site)), f"responses named {named}"
    assert set(there) <= named, "the retry created another job"
    site.cancel(*named)
    return f"{lost}, {num_jobs} jobs left; the retries named one job"


def _job_ids(site: FaultSite) -> list[str]:
    with site.db.read() as session:
        return [job.id for job in session.query(Job)]


@fault(
    "api-sigterm",
    "SIGTERM of the API server during a submission",
    promise="the request gets a response; exit status 0",
    databases=DATABASES,
)
def terminate_api_in_submission(site: FaultSite) -> str:
    file_id = site.upload(NUM_ROWS)
    api = site.start_api(FAILPOINT=f"submit_before_commit:wait={site.gate('commit')}")
    with ThreadPoolExecutor(max_workers=1) as pool:
        asked = pool.submit(site.post_job, file_id, idempotency_key="submission-1", **SMALL)
        site.wait_until(site.is_anybody_writing)
        api.terminate()
        site.wait_until(lambda: not site.is_listening())
        site.gate("commit").touch()
        answer = asked.result(PATIENCE_SECONDS)

    assert answer.status_code == 200, answer.text
    site.assert_exits(api)
    site.cancel(answer.json()["id"])
    return "the open request got a 200; the API server exited with status 0"


@fault(
    "api-killed-in-webhook",
    "kill -9 of the API server while it sends a webhook",
    promise="it is sent again with the same id",
)
def kill_api_in_webhook(site: FaultSite) -> str:
    with receiving() as receiver:
        has_come, may_answer = threading.Event(), threading.Event()

        def answer(request: Received) -> Answer:
            site.heard(request)
            has_come.set()
            may_answer.wait(PATIENCE_SECONDS)
            return Answer()

        receiver.answer = answer
        add_endpoint(site, receiver.url)
        api = site.start_api()
        site.cancel(site.submit_small())
        assert has_come.wait(PATIENCE_SECONDS), site.log()
        api.kill()
        api.wait()
        may_answer.set()
        site.start_api()
        site.wait_until(lambda: len(site.hooks) > 1)
        site.wait_until(lambda: all_delivered(site))
    ids = {hook.event_id for hook in site.hooks}
    assert len(ids) == 1, f"it came as {ids}"
    return f"{len(site.hooks)} requests with one id"


def add_endpoint(site: FaultSite, url: str) -> None:
    wanted: Any = ["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
    given = {"name": "ops", "url": url, "event_types": wanted, "pepper": Pepper(current=PEPPER.encode())}
    endpoints.create(site.db, project_id=site.caller.project_id, **given)


def all_delivered(site: FaultSite) -> bool:
    """Return whether the webhooks of the site's own project are delivered. Others' endpoints may never answer."""
    own = select(WebhookDelivery.status).join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
    with site.db.read() as session:
        statuses = session.scalars(own.where(WebhookEndpoint.project_id == site.caller.project_id)).all()
    return all(status == "delivered" for status in statuses)
