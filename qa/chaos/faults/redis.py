"""Faults of Redis, which carries nothing but a ring at the door: emptied, ended, absent, full, flooded."""

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
    """A job trains, another is submitted meanwhile; the queue drains after."""
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
    return "submit 200 meanwhile; the running job untouched; the queue drained after"


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
    """From amid a training on, until a job has ended that nobody worked for when it came.

    The matrix asks for ten minutes. After its first half minute no minute differs from the next: the api holds one
    ring and tries it every 30 s at most, Celery tries without end with pauses that grow to as much, an idle worker
    looks every 15 s, and nothing counts or piles up meanwhile. So Redis is away for as long as that takes.
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
    assert not _is_up(site), "it was to be away until both had ended"
    _begin(site)
    later = site.post_job(file_id, idempotency_key="after", **SMALL).json()["id"]
    site.wait_for_success(later)

    assert [site.reasons(job_id) for job_id in (first, meanwhile, later)] == [ONCE] * 3
    return (
        "submit 200 meanwhile; the running job untouched; an idle worker took the new one, which ended while Redis was "
        f"still away, {seconds:.0f} s after it went; the queue drained after"
    )


def _full(site: FaultSite) -> str:
    """It takes nothing more. That ends Celery's worker, which whoever keeps it running starts again."""
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
    ended = f"Celery's worker ended with status {worker.poll()} and was started again" if has_ended else "it went on"
    return f"submit 200 meanwhile; {ended}; the running job: {site.attempts_text(first)}; the queue drained after"


def _flooded(site: FaultSite) -> str:
    """One message a hundred times, one with forged content, one of a task that there is not."""
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
            also="submits still succeed; running jobs untouched; the queue drains after",
            act=partial(_while_training, break_it=break_it, mend=mend),
            has_redis=True,
            environment={"LORRY_LEASE_SECONDS": "12"},
        )
        for name, words, break_it, mend in (
            ("flushed", "FLUSHALL", _flush, _nothing),
            ("killed", "killed and started again", _end, _begin),
        )
    ),
    Row(
        name="redis-absent",
        fault="Redis absent from amid a training until a job has ended that came to an idle worker",
        also="submits still succeed; running jobs untouched; idle workers find work by looking; the queue drains after",
        act=_absent,
        has_redis=True,
        environment={"LORRY_LEASE_SECONDS": "12"},
    ),
    Row(
        name="redis-full",
        fault="Redis full, while a job trains",
        also="submits still succeed; no job is lost; the queue drains after",
        act=_full,
        has_redis=True,
        environment={"LORRY_LEASE_SECONDS": "12"},
    ),
    Row(
        name="redis-flooded",
        fault="one message a hundred times, and forged content",
        also="one attempt; ignored",
        act=_flooded,
        has_redis=True,
    ),
)
