"""Faults of Redis, which carries only notifications: flushed, killed, unavailable, full, flooded."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import redis

from catalog.states import EndReason
from qa.chaos.scenario import Row
from qa.chaos.service import NUM_ROWS, SMALL, FaultSite

CELERY = [sys.executable, "-m", "celery", "-A", "worker.entrypoints.celery_app"]
WORKER = [*CELERY, "worker", "--without-gossip", "--without-mingle", "-c", "1", "-Q", "lorry", "-l", "warning"]
FULL_SECONDS = 20.0
ONCE = [EndReason.COMPLETED]


def _while_training(
    site: FaultSite, *, break_it: Callable[[FaultSite], None], mend: Callable[[FaultSite], None]
) -> str:
    """Break Redis while a job trains. Another job is submitted meanwhile, and the queue drains afterwards."""
    file_id = site.upload(NUM_ROWS)
    site.start_api()
    first = site.post_job(file_id, idempotency_key="before", **SMALL).json()["id"]
    _start_celery(site, FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_for_step(15, first)
    break_it(site)
    answer = site.post_job(file_id, idempotency_key="meanwhile", **SMALL)
    assert answer.status_code == 200, answer.text
    site.gate("go").touch()
    mend(site)
    later = site.post_job(file_id, idempotency_key="after", **SMALL).json()["id"]

    site.wait_for_success(first, answer.json()["id"], later)

    assert [site.reasons(job_id) for job_id in (first, answer.json()["id"], later)] == [ONCE] * 3
    return "submit 200 meanwhile; the running job unaffected; the queue drained afterwards"


def _start_celery(site: FaultSite, **environment: str) -> subprocess.Popen[bytes]:
    return site.start(WORKER, LORRY_DEVICE="cpu", **environment)


def _client(site: FaultSite) -> redis.Redis:
    return redis.Redis.from_url(site.under.redis_url)


def _is_up(site: FaultSite) -> bool:
    try:
        with _client(site) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


def _flush(site: FaultSite) -> None:
    with _client(site) as client:
        client.flushall()


def _end(site: FaultSite) -> None:
    assert site.under.redis is not None
    site.under.redis.kill()


def _begin(site: FaultSite) -> None:
    assert site.under.redis is not None
    site.under.redis.start()


def _nothing(_site: FaultSite) -> None:
    return


def _absent(site: FaultSite) -> str:
    """Stop Redis during a training, until a job has finished that was submitted while the worker was idle.

    The matrix requires ten minutes. After the first half minute, all minutes are alike: the API server holds one
    notification and retries it at least every 30 s, Celery retries forever with pauses of up to 30 s, and an idle
    worker polls every 15 s. Nothing accumulates meanwhile, so a shorter outage is sufficient.
    """
    file_id = site.upload(NUM_ROWS)
    site.start_api()
    first = site.post_job(file_id, idempotency_key="before", **SMALL).json()["id"]
    worker = _start_celery(site, FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_for_step(15, first)
    _end(site)
    began = time.monotonic()
    site.gate("go").touch()
    site.wait_for_success(first)
    site.wait_until(lambda: not site.trainers_of(worker))
    answer = site.post_job(file_id, idempotency_key="meanwhile", **SMALL)
    assert answer.status_code == 200, answer.text
    meanwhile = answer.json()["id"]
    site.wait_for_success(meanwhile)
    seconds = time.monotonic() - began
    assert not _is_up(site), "Redis must be unavailable until both jobs have finished"
    _begin(site)
    later = site.post_job(file_id, idempotency_key="after", **SMALL).json()["id"]
    site.wait_for_success(later)

    assert [site.reasons(job_id) for job_id in (first, meanwhile, later)] == [ONCE] * 3
    return (
        "submit 200 meanwhile; the running job unaffected; an idle worker took the new job, which finished "
        f"{seconds:.0f} s after Redis stopped, and before it restarted; the queue drained afterwards"
    )


def _full(site: FaultSite) -> str:
    """Make Redis reject writes. Celery's worker exits, and is restarted as a process supervisor would do."""
    file_id = site.upload(NUM_ROWS)
    site.start_api()
    first = site.post_job(file_id, idempotency_key="before", **SMALL).json()["id"]
    worker = _start_celery(site, FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_for_step(15, first)
    with _client(site) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        answer = site.post_job(file_id, idempotency_key="meanwhile", **SMALL)
        assert answer.status_code == 200, answer.text
        site.gate("go").touch()
        site.wait_seconds(FULL_SECONDS)
        client.config_set("maxmemory", 0)
    has_ended = worker.poll() is not None
    if has_ended:
        _start_celery(site)
    later = site.post_job(file_id, idempotency_key="after", **SMALL).json()["id"]

    job_ids = (first, answer.json()["id"], later)
    site.wait_for_success(*job_ids)

    allowed = (ONCE, [EndReason.INFRA_LOST, *ONCE])
    attempts = [site.attempts_text(job_id) for job_id in job_ids]
    assert all(site.reasons(job_id) in allowed for job_id in job_ids), attempts
    ended = f"Celery's worker exited with status {worker.poll()} and was restarted" if has_ended else "it kept running"
    return f"submit 200 meanwhile; {ended}; the running job: {site.attempts_text(first)}; the queue drained afterwards"


def _flooded(site: FaultSite) -> str:
    """Send one message a hundred times, one with forged content, and one for an unknown task."""
    job_id = site.submit_small()
    program = """
from worker.entrypoints.celery_app import app
for _ in range(100):
    app.send_task("lorry.work")
app.send_task("lorry.work", args=["ftjob-forged", {"claim_id": "mine"}])
app.send_task("os.system", args=["true"])
"""
    assert site.start([sys.executable, "-c", program]).wait(120) == 0, site.log()
    _start_celery(site)
    site.wait_for_success(job_id)
    with _client(site) as client:
        site.wait_until(lambda: client.llen("lorry:lorry") == 0)
    assert site.reasons(job_id) == ONCE, site.attempts_text(job_id)
    return "one attempt; the others were ignored"


ROWS = (
    *(
        Row(
            name=f"redis-{name}",
            fault=f"Redis {words}, while a job trains",
            also="submits still succeed; running jobs unaffected; the queue drains afterwards",
            act=partial(_while_training, break_it=break_it, mend=mend),
            has_redis=True,
            environment={"LORRY_LEASE_SECONDS": "12"},
        )
        for name, words, break_it, mend in (
            ("flushed", "FLUSHALL", _flush, _nothing),
            ("killed", "killed and restarted", _end, _begin),
        )
    ),
    Row(
        name="redis-absent",
        fault="Redis stopped during a training until an idle worker has finished a new job",
        also="submits succeed; running jobs unaffected; idle workers find work by polling; the queue drains afterwards",
        act=_absent,
        has_redis=True,
        environment={"LORRY_LEASE_SECONDS": "12"},
    ),
    Row(
        name="redis-full",
        fault="Redis full, while a job trains",
        also="submits still succeed; no job is lost; the queue drains afterwards",
        act=_full,
        has_redis=True,
        environment={"LORRY_LEASE_SECONDS": "12"},
    ),
    Row(
        name="redis-flooded",
        fault="one message a hundred times, and forged content",
        also="one attempt; the other messages are ignored",
        act=_flooded,
        has_redis=True,
    ),
)
