"""The doorbell on a real Redis: a ring is all that a message is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy import update

from catalog.db import revisions
from catalog.fleet import cordons, workers
from catalog.states import EndReason, JobState
from tests.next_migration import LATER
from tests.services.redis import restartable_redis
from tests.services.running import free_port
from tests.worker_site import PEPPER, WAIT_SECONDS, WorkerSite, bare_site, worker_site
from worker.context.context import UNFIT

pytestmark = pytest.mark.timeout(600)
WORKER = [
    sys.executable,
    "-m",
    "celery",
    "-A",
    "worker.entrypoints.celery_app",
    "worker",
    "--without-gossip",
    "--without-mingle",
]

RUNG_ONLY = [
    sys.executable,
    "-c",
    "from worker.entrypoints import celery_app; celery_app.turns.seconds = 3600.0; "
    "celery_app.app.worker_main('worker -c 1 -Q lorry -l warning --without-gossip --without-mingle'.split())",
]
"""One that doesn't look by itself: for what rings do."""
SETTINGS = {
    "task_acks_late": False,
    "task_reject_on_worker_lost": False,
    "worker_disable_prefetch": True,
    "worker_prefetch_multiplier": 1,
    "worker_concurrency": 1,
    "task_ignore_result": True,
    "result_backend": None,
    "accept_content": ["json"],
    "task_serializer": "json",
    "task_default_queue": "lorry",
    "broker_connection_max_retries": None,
    "broker_connection_retry_on_startup": True,
    "worker_hijack_root_logger": False,
    "broker_transport_options": {
        "visibility_timeout": 3600,
        "health_check_interval": 10,
        "socket_timeout": 10,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
        "global_keyprefix": "lorry:",
    },
    # a training takes as long as it takes, and its process is the worker
    "task_time_limit": None,
    "task_soft_time_limit": None,
    "worker_max_tasks_per_child": None,
    # a client of Redis could end workers
    "worker_enable_remote_control": False,
    # the API servers ring periodically
    "beat_schedule": {},
}


def ring(site: WorkerSite, *messages: tuple[object, ...]) -> None:
    """Send in a child, as the api does from its own process: of each message the name, and its arguments."""
    program = f"""
from worker.entrypoints.celery_app import app
for name, *arguments in {messages!r}:
    app.send_task(name, args=arguments)
"""
    assert site.start([sys.executable, "-c", program]).wait(60) == 0, site.log()


def listens_to_remote_control(url: str) -> bool:
    """Whether a worker has bound a queue to Celery's exchange of control messages, such as `shutdown`."""
    with redis.Redis.from_url(url) as client:
        return any(b"pidbox" in key for key in client.scan_iter())


def waiting_messages(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        return int(client.llen("lorry:lorry"))  # pyright: ignore[reportArgumentType]


def test_celery_is_set_as_was_measured() -> None:
    program = f"""
import json
from worker.entrypoints.celery_app import app
print(json.dumps({{name: app.conf[name] for name in {sorted(SETTINGS)!r}}}))
"""
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout

    assert json.loads(told) == SETTINGS


def test_what_an_opening_that_fails_has_begun_is_ended(tmp_path: Path) -> None:
    program = """
import threading
from catalog.errors import Unavailable
from worker.entrypoints import celery_app
for _ in range(3):
    try:
        celery_app.context()
    except Unavailable:
        print([thread.name for thread in threading.enumerate()])
"""
    nowhere = f"127.0.0.1:{free_port()}"
    environment = os.environ | {
        "LORRY_DATA_DIR": str(tmp_path),
        "LORRY_DATABASE_URL": f"postgresql+psycopg://lorry@{nowhere}/lorry",
        "LORRY_DEVICE": "cpu",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{nowhere}",
    }
    command = [sys.executable, "-c", program]

    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    assert told.splitlines() == ["['MainThread']"] * 3


def test_a_pool_process_ends_the_main_one_by_one_signal() -> None:
    program = """
import os
from worker.entrypoints import celery_app
os.kill = lambda *sent: print(*sent)
celery_app._end_main()
celery_app._end_main()
"""
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout

    assert told.splitlines() == [f"{os.getpid()} {signal.SIGTERM.value}"]


def test_one_ring_a_hundred_times_and_forged_ones_make_one_attempt(tmp_path: Path, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    with worker_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu") as site:
        job_id = site.submit(site.upload(12), max_steps=3)
        forged = ("lorry.work", "ftjob-forged", {"claim_id": "mine"})
        unknown = (f"os.system.{uuid.uuid4().hex}", json.dumps({"job": job_id}))
        ring(site, *[("lorry.work",)] * 100, forged, unknown)
        worker = site.start(RUNG_ONLY, LORRY_STANDBY_TRAINER="true")

        site.wait_for_end(job_id)
        site.wait_until(lambda: waiting_messages(redis_url) == 0)
        site.wait_until(site.standing_by)

        assert site.job(job_id).state == JobState.SUCCEEDED, site.log()
        assert len(site.attempts(job_id)) == 1
        assert len(site.adapters()) == 1
        assert not listens_to_remote_control(redis_url)
        worker.terminate()
        assert worker.wait(60) == 0, site.log()
        assert list((site.settings.work_dir() / "trainers").iterdir()) == []


@pytest.mark.slow
def test_the_api_servers_loop_rings_for_a_job_whose_message_was_lost(tmp_path: Path, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    with worker_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu") as site:
        job_id = site.submit(site.upload(12), max_steps=3)  # sends nothing
        site.start(RUNG_ONLY)

        site.start([sys.executable, "-m", "api", "serve", "--port", "0"], LORRY_PEPPER=PEPPER)

        site.wait_for_end(job_id)
        assert site.job(job_id).state == JobState.SUCCEEDED, site.log()


@pytest.mark.slow
def test_a_worker_that_is_told_to_end_amid_training_releases_the_job_and_another_finishes_with_the_same_bytes(
    tmp_path: Path, redis_url: str
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    with worker_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu") as site:
        rows, command = site.upload(20), [*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"]
        disturbed = site.submit(rows, max_steps=12, checkpoint_every_steps=1000)
        worker = site.start(command, FAILPOINT=f"step_6:wait={site.gate('leave')}")
        ring(site, ("lorry.work",))
        site.wait_for_step(6, disturbed)
        pid = site.trainer_pid(disturbed)
        worker.terminate()
        site.wait_for_message("drain")

        site.gate("leave").touch()

        assert worker.wait(WAIT_SECONDS) == 0, site.log()
        assert not psutil.pid_exists(pid)
        released = site.job(disturbed)
        assert (released.state, released.claim_id, released.counted_attempts) == (JobState.QUEUED, None, 0), site.log()
        undisturbed = site.submit(rows, max_steps=12, checkpoint_every_steps=1000)
        site.start(command)
        ring(site, ("lorry.work",))
        site.wait_for_end(disturbed, undisturbed)
        assert site.job(disturbed).state == JobState.SUCCEEDED, site.log()
        assert [attempt.reason for attempt in site.attempts(disturbed)] == [EndReason.DRAINED, EndReason.COMPLETED]
        assert site.attempts(disturbed)[1].resumed_from_step == 6
        assert site.weights_digest(disturbed) == site.weights_digest(undisturbed)


@pytest.mark.slow
def test_an_idle_worker_takes_a_job_while_redis_is_away_and_hears_rings_once_it_is_back(tmp_path: Path) -> None:
    with restartable_redis() as (url, server), worker_site(tmp_path, LORRY_REDIS_URL=url, LORRY_DEVICE="cpu") as site:
        rows = site.upload(12)
        first = site.submit(rows, max_steps=3)
        worker = site.start([*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"])
        ring(site, ("lorry.work",))
        site.wait_for_end(first)
        server.kill()
        meanwhile = site.submit(rows, max_steps=3)

        site.wait_for_end(meanwhile)

        assert site.job(meanwhile).state == JobState.SUCCEEDED, site.log()
        assert site.reasons(meanwhile) == [EndReason.COMPLETED]
        server.start()
        ring(site, ("lorry.work",))
        site.wait_until(lambda: waiting_messages(url) == 0)
        server.kill()
        worker.terminate()
        assert worker.wait(WAIT_SECONDS) == 0, site.log()
        assert workers.list_workers(site.db)[0].ended_at is not None


@pytest.mark.slow
def test_a_worker_that_never_saw_redis_saves_the_job_that_it_found_by_itself_when_it_is_told_to_end(
    tmp_path: Path,
) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    with worker_site(tmp_path, LORRY_REDIS_URL=nowhere, LORRY_DEVICE="cpu") as site:
        command = [*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"]
        worker = site.start(command, FAILPOINT=f"step_6:wait={site.gate('leave')}")
        job_id = site.submit(site.upload(20), max_steps=12, checkpoint_every_steps=1000)
        site.wait_for_step(6, job_id)
        worker.terminate()
        site.wait_for_message("drain")

        site.gate("leave").touch()

        assert worker.wait(WAIT_SECONDS) == 0, site.log()
        released = site.job(job_id)
        assert (released.state, released.claim_id, released.counted_attempts) == (JobState.QUEUED, None, 0), site.log()
        assert site.checkpoint_steps(job_id)[-1] == 6


def test_a_drained_celery_worker_ends(tmp_path: Path, redis_url: str) -> None:
    with bare_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu") as site:
        worker = site.start([*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"])
        site.wait_until(lambda: workers.list_workers(site.db))

        cordons.drain(site.db, workers.list_workers(site.db)[0].id)

        assert worker.wait(WAIT_SECONDS) == 0, site.log()
        assert workers.list_workers(site.db)[0].ended_at is not None


def test_a_celery_worker_that_does_not_fit_ends_before_it_takes_a_message(tmp_path: Path, redis_url: str) -> None:
    with bare_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu") as site:
        with site.db.write() as session:
            session.execute(update(revisions.VERSIONS).values(version_num=LATER))

        worker = site.start([*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"])

        assert worker.wait(WAIT_SECONDS) == UNFIT, site.log()
        assert f"it is at {LATER}, which is newer. Install the service's version" in site.log()
        assert workers.list_workers(site.db, ended_within_seconds=0) == []


def test_celerys_own_command_starts_no_worker_of_a_gang(tmp_path: Path, redis_url: str) -> None:
    gang = {"LORRY_GANG": "hall", "LORRY_ADVERTISE_ADDRESS": "127.0.0.1"}
    with bare_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu", **gang) as site:
        worker = site.start([*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"])

        assert worker.wait(WAIT_SECONDS) == UNFIT, site.log()
        assert "Start it with `lorry worker`" in site.log()
        assert workers.list_workers(site.db) == []
