"""Faults of what a service runs on: its database, Redis, the network to the database, and clocks."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psycopg
import redis
from sqlalchemy import make_url

from catalog.states import FINAL_STATES, EndReason, JobState
from qa.chaos.environment import DATABASES, POSTGRESQL, fault
from qa.chaos.service import NUM_ROWS, PATIENCE_SECONDS, SMALL, FaultSite
from tests.services.fault_proxy import fault_proxy
from tests.worker_site import is_gone

LOCKED_SECONDS = 33.0
"""SQLite's writers give up after 30."""
LONG_LEASE = {"LORRY_LEASE_SECONDS": "60", "LORRY_HEARTBEAT_SECONDS": "1"}
CELERY = [sys.executable, "-m", "celery", "-A", "worker.entrypoints.celery_app"]
WORKER = [*CELERY, "worker", "--without-gossip", "--without-mingle", "-c", "1", "-Q", "lorry", "-l", "warning"]
HOUR = 3600.0
LOOKS_SECONDS = 10.0
"""Time limit after the end of a lease for the API server to detect it, on a busy machine."""
SHIFTED = '''"""Python runs this first. It shifts the wall clock, and creates a file named by the process id."""

import datetime
import os
import pathlib
import time

SECONDS = {seconds}
_real, _real_ns, _Real = time.time, time.time_ns, datetime.datetime


class Shifted(_Real):
    @classmethod
    def now(cls, tz=None):
        return _Real.now(tz) + datetime.timedelta(seconds=SECONDS)

    @classmethod
    def utcnow(cls):
        return _Real.utcnow() + datetime.timedelta(seconds=SECONDS)


time.time = lambda: _real() + SECONDS
time.time_ns = lambda: _real_ns() + int(SECONDS * 1e9)
datetime.datetime = Shifted
(pathlib.Path(__file__).parent / str(os.getpid())).touch()
'''
"""The system's clock affects the whole machine. Compiled libraries such as SQLite still read the real clock."""


@fault(
    "database-restarted",
    "database restarted, for less than a lease, while a job trains",
    promise="submit 503 and Retry-After; no lease expires",
    databases=POSTGRESQL,
    environment=LONG_LEASE,
)
def restart_database(site: FaultSite) -> str:
    assert site.under.postgres is not None
    file_id = site.upload(NUM_ROWS)
    site.start_api()
    job_id, _ = site.train_to_step_15()
    site.under.postgres.stop()
    refused = _submit(site, file_id, "while-down")
    site.gate("go").touch()
    site.wait_seconds(2)
    site.under.postgres.start()

    told = _assert_unavailable(refused)
    site.wait_for_success(job_id)
    site.assert_attempts(job_id, EndReason.COMPLETED)
    _accepts(site, _submit(site, file_id, "while-down"))
    return f"{told}; then accepted. The running job: {site.attempts_text(job_id)}"


@fault(
    "database-killed-submitting",
    "database killed between the last statement of a submission and the commit",
    promise="503, no job; the retry creates one",
    databases=POSTGRESQL,
)
def kill_database_in_submission(site: FaultSite) -> str:
    assert site.under.postgres is not None
    file_id = site.upload(NUM_ROWS)
    site.start_api(FAILPOINT=f"submit_before_commit:wait={site.gate('commit')}")
    with ThreadPoolExecutor(max_workers=1) as pool:
        asked = pool.submit(_submit, site, file_id, "killed")
        site.wait_until(site.is_anybody_writing)
        site.under.postgres.kill()
        site.under.postgres.start()
        site.gate("commit").touch()
        told = _assert_unavailable(asked.result(PATIENCE_SECONDS))
    site.wait_until(lambda: site.num_jobs() == 0)

    _accepts(site, _submit(site, file_id, "killed"))
    return f"{told}, no job left; the retry created one"


@fault(
    "database-killed-completing",
    "database killed between the last statement of a completion and the commit",
    promise="completed once",
    databases=POSTGRESQL,
    environment=LONG_LEASE,
)
def kill_database_in_completion(site: FaultSite) -> str:
    assert site.under.postgres is not None
    job_id = site.submit_small()
    site.start_worker(FAILPOINT=f"in_complete:wait={site.gate('commit')}")
    site.wait_for_file("jobs/*/adapter/adapter_model.safetensors")
    site.wait_until(site.is_anybody_writing)
    site.under.postgres.kill()
    site.under.postgres.start()
    site.gate("commit").touch()

    site.wait_for_success(job_id)

    site.assert_attempts(job_id, EndReason.COMPLETED)
    return f"the worker completed it again: {site.attempts_text(job_id)}"


@fault(
    "database-locked",
    "database locked for 33 s while a job trains",
    promise="submit waits, or 503 and Retry-After; no lease expires",
    databases=DATABASES,
    environment=LONG_LEASE,
)
def lock_database(site: FaultSite) -> str:
    file_id = site.upload(NUM_ROWS)
    site.start_api()
    job_id, _ = site.train_to_step_15()
    with ThreadPoolExecutor(max_workers=1) as pool:
        with _lock_of(site):
            site.gate("go").touch()
            asked = pool.submit(_submit, site, file_id, "locked")
            site.wait_seconds(LOCKED_SECONDS)
        answer = asked.result(PATIENCE_SECONDS)

    told = _assert_unavailable(answer) if answer.status_code != 200 else "the submission waited"
    site.wait_for_success(job_id)
    site.assert_attempts(job_id, EndReason.COMPLETED)
    _accepts(site, _submit(site, file_id, "locked"))
    return f"{told}. The running job: {site.attempts_text(job_id)}"


@contextmanager
def _lock_of(site: FaultSite) -> Generator[None]:
    url = make_url(site.db.url)
    if site.db.is_sqlite:
        connection = sqlite3.connect(str(url.database), isolation_level=None, timeout=PATIENCE_SECONDS)
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.close()
        return
    with psycopg.connect(site.db.url.replace("+psycopg", "")) as connection:
        connection.execute("lock table jobs in exclusive mode")
        yield


@fault(
    "worker-cut-off",
    "one worker cut off from the database for two leases, then reconnected",
    promise="its writes are refused; its trainer exited before its lease expired",
    databases=POSTGRESQL,
)
def cut_worker_off(site: FaultSite) -> str:
    url = make_url(site.db.url)
    with fault_proxy(str(url.host), url.port or 0) as proxy:
        through = site.db.url.replace(f":{url.port}/", f":{proxy.port}/")
        job_id, cut_off = site.train_to_step_15(LORRY_DATABASE_URL=through)
        trainer = site.trainer_of(cut_off)
        proxy.part()
        gone_after = site.seconds_until(lambda: is_gone(trainer))
        assert gone_after < site.settings.lease_seconds, f"the trainer ended after {gone_after:.1f} s"
        site.finish(job_id)
        before = [event.seq for event in site.events(job_id)]

        proxy.heal()
        site.wait_seconds(site.settings.lease_seconds)

        assert [event.seq for event in site.events(job_id)] == before, "it wrote after it had lost its claim"
        cut_off.terminate()
        site.assert_exits(cut_off)
    site.assert_attempts(job_id, EndReason.INFRA_LOST, EndReason.COMPLETED)
    return f"trainer gone before its lease expired; {site.attempts_text(job_id)}; nothing written after the outage"


def _submit(site: FaultSite, file_id: str, key: str) -> httpx.Response:
    return site.post_job(file_id, idempotency_key=key, **SMALL)


def _assert_unavailable(response: httpx.Response) -> str:
    assert response.status_code == 503, f"{response.status_code} {response.text}"
    assert int(response.headers["retry-after"]) > 0
    return f"submit {response.status_code} with Retry-After {response.headers['retry-after']}"


def _accepts(site: FaultSite, response: httpx.Response) -> None:
    assert response.status_code == 200, response.text
    if site.job(response.json()["id"]).state not in FINAL_STATES:
        site.cancel(response.json()["id"])
        site.wait_for_end(response.json()["id"])


@fault(
    "redis-stopped",
    "Redis stopped during a training until an idle worker has finished a new job",
    promise="submits succeed; running jobs unaffected; idle workers poll; the queue drains afterwards",
    environment={"LORRY_LEASE_SECONDS": "12"},
    has_redis=True,
)
def stop_redis(site: FaultSite) -> str:
    """After the first half minute, all minutes of an outage are alike: API server, Celery and idle workers retry at
    least every 30 s, and nothing accumulates."""
    assert site.under.redis is not None
    file_id = site.upload(NUM_ROWS)
    site.start_api()
    first = site.post_job(file_id, idempotency_key="before", **SMALL).json()["id"]
    worker = _start_celery(site, FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_for_step(15, first)
    site.under.redis.kill()
    began = time.monotonic()
    site.gate("go").touch()
    site.wait_for_success(first)
    site.wait_until(lambda: not site.trainers_of(worker))
    answer = site.post_job(file_id, idempotency_key="meanwhile", **SMALL)
    assert answer.status_code == 200, answer.text
    meanwhile = answer.json()["id"]
    site.wait_for_success(meanwhile)
    seconds = time.monotonic() - began
    assert not site.under.redis.is_running, "Redis must be unavailable until both jobs have finished"
    site.under.redis.start()
    later = site.post_job(file_id, idempotency_key="after", **SMALL).json()["id"]
    site.wait_for_success(later)

    for job_id in (first, meanwhile, later):
        site.assert_attempts(job_id, EndReason.COMPLETED)
    return f"submit 200 meanwhile; an idle worker finished the new job {seconds:.0f} s after Redis stopped"


@fault(
    "redis-flooded",
    "one message a hundred times, one with forged content, and one for an unknown task",
    promise="one attempt; the other messages are ignored",
    has_redis=True,
)
def flood_redis(site: FaultSite) -> str:
    job_id = site.submit_small()
    program = """
from worker.entrypoints.celery_app import app
for _ in range(100):
    app.send_task("lorry.work")
app.send_task("lorry.work", args=["ftjob-forged", {"claim_id": "mine"}])
app.send_task("os.system", args=["true"])
"""
    site.assert_exits(site.start([sys.executable, "-c", program]))
    _start_celery(site)
    site.wait_for_success(job_id)
    with redis.Redis.from_url(site.under.redis_url) as client:
        site.wait_until(lambda: client.llen("lorry:lorry") == 0)
    site.assert_attempts(job_id, EndReason.COMPLETED)
    return "one attempt; the others were ignored"


def _start_celery(site: FaultSite, **environment: str) -> subprocess.Popen[bytes]:
    return site.start(WORKER, LORRY_DEVICE="cpu", **environment)


@fault(
    "clocks-shifted",
    "a worker's clock is an hour ahead, the API server's an hour behind",
    promise="leases unchanged: each worker keeps its job, and a killed one loses it after its lease",
    databases=DATABASES,
    environment={"LORRY_LEASE_SECONDS": "20"},  # else a busy machine could lose a lease, which looks like an effect
)
def shift_clocks(site: FaultSite) -> str:
    """Only the database's clock must matter. Next to a worker with the right clock, both keep their jobs for two
    leases. Killed, the worker loses its job after exactly one lease."""
    api = site.start_api(PYTHONPATH=_shifted(site, "behind", -HOUR))
    theirs = site.submit_small()
    off = _worker(site, gate="off", PYTHONPATH=_shifted(site, "ahead", HOUR))
    site.wait_for_step(15, theirs)
    for name, pid in (("behind", api.pid), ("ahead", off.pid), ("ahead", site.trainer_of(off).pid)):
        assert (site.folder / name / str(pid)).exists(), f"the clock of the process {pid} is right"
    ours = site.submit_small()
    _worker(site, gate="right")
    site.wait_for_step(15, ours)
    site.wait_seconds(2 * site.settings.lease_seconds)
    for job_id in (theirs, ours):
        assert (site.job(job_id).state, len(site.attempts(job_id))) == (JobState.RUNNING, 1), site.attempts_text(job_id)

    off.send_signal(signal.SIGKILL)
    off.wait()
    ends_at = site.job(theirs).lease_expires_at
    assert ends_at is not None
    lost_after = site.seconds_until(lambda: site.reasons(theirs)[:1] == [EndReason.INFRA_LOST])
    assert site.attempts(theirs)[0].ended_at >= ends_at, "its job was requeued before the lease had expired"
    assert lost_after < site.settings.lease_seconds + LOOKS_SECONDS, f"its lease ended {lost_after:.0f} s later"
    site.gate("off").touch()
    site.gate("right").touch()
    site.finish(theirs, ours)

    site.assert_attempts(theirs, EndReason.INFRA_LOST, EndReason.COMPLETED)
    site.assert_attempts(ours, EndReason.COMPLETED)
    times = [event.created_at for job_id in (theirs, ours) for event in site.events(job_id)]
    times += [attempt.started_at for job_id in (theirs, ours) for attempt in site.attempts(job_id)]
    assert max(times) - min(times) < HOUR / 2, f"recorded times differ by {max(times) - min(times):.0f} s"
    return f"both kept their jobs for two leases; the killed worker's job was requeued after {lost_after:.0f} s"


def _worker(site: FaultSite, *, gate: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start a worker that takes one job, and waits at step 15."""
    return site.start_worker(LORRY_MAX_JOBS_PER_TRAINER="1", FAILPOINT=f"step_15:wait={site.gate(gate)}", **environment)


def _shifted(site: FaultSite, name: str, seconds: float) -> str:
    folder = site.folder / name
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SHIFTED.format(seconds=seconds))
    return str(folder)
