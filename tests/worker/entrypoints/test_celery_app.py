"""The wake-up notification on a real Redis: a message wakes a worker, and has no other effect."""

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
from tests.services.running import closed_port
from tests.worker_site import PEPPER, WAIT_SECONDS, WorkerSite, bare_site, worker_site
from worker.context.context import UNFIT

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

NOTIFIED_ONLY = [
    sys.executable,
    "-c",
    "from worker.entrypoints import celery_app; celery_app.poller.seconds = 3600.0; "
    "celery_app.app.worker_main('worker -c 1 -Q lorry -l warning --without-gossip --without-mingle'.split())",
]
"""A worker that doesn't poll on its own, to test the effect of notifications."""
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
    # training has no time limit, and its process is the worker
    "task_time_limit": None,
    "task_soft_time_limit": None,
    "worker_max_tasks_per_child": None,
    # a client of Redis could stop workers
    "worker_enable_remote_control": False,
    # the API servers send notifications periodically
    "beat_schedule": {},
}


def notify(site: WorkerSite, *messages: tuple[object, ...]) -> None:
    """Send messages, each a task name and its arguments, from a child process, as the API server does."""
    program = f"""
from worker.entrypoints.celery_app import app
for name, *arguments in {messages!r}:
    app.send_task(name, args=arguments)
"""
    assert site.start([sys.executable, "-c", program]).wait(WAIT_SECONDS) == 0, site.log()


def listens_to_remote_control(url: str) -> bool:
    """Return whether a worker has bound a queue to Celery's exchange of control messages, such as `shutdown`."""
    with redis.Redis.from_url(url) as client:
        return any(b"pidbox" in key for key in client.scan_iter())


def waiting_messages(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        return int(client.llen("lorry:lorry"))  # pyright: ignore[reportArgumentType]


def test_celery_settings_are_the_measured_ones() -> None:
    program = f"""
import json
from worker.entrypoints.celery_app import app
print(json.dumps({{name: app.conf[name] for name in {sorted(SETTINGS)!r}}}))
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout

    assert json.loads(output) == SETTINGS


def test_a_failed_start_leaves_no_threads(tmp_path: Path) -> None:
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
    environment = os.environ | {"LORRY_DATA_DIR": str(tmp_path), "LORRY_DEVICE": "cpu"}
    command = [sys.executable, "-c", program]

    with closed_port() as port:
        environment["LORRY_DATABASE_URL"] = f"postgresql+psycopg://lorry@127.0.0.1:{port}/lorry"
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{port}"
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    assert output.splitlines() == ["['MainThread']"] * 3


def test_a_pool_process_signals_the_main_process_once() -> None:
    program = """
import os
from worker.entrypoints import celery_app
os.kill = lambda *sent: print(*sent)
celery_app._terminate_main()
celery_app._terminate_main()
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout

    assert output.splitlines() == [f"{os.getpid()} {signal.SIGTERM.value}"]


def test_repeated_and_forged_notifications_start_one_attempt(tmp_path: Path, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    with worker_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu") as site:
        job_id = site.submit(site.upload(12), max_steps=3)
        forged = ("lorry.work", "ftjob-forged", {"claim_id": "mine"})
        unknown = (f"os.system.{uuid.uuid4().hex}", json.dumps({"job": job_id}))
        notify(site, *[("lorry.work",)] * 100, forged, unknown)
        worker = site.start(NOTIFIED_ONLY, LORRY_STANDBY_TRAINER="true")

        site.wait_for_end(job_id)
        site.wait_until(lambda: waiting_messages(redis_url) == 0)
        site.wait_until(site.standing_by)

        assert site.job(job_id).state == JobState.SUCCEEDED, site.log()
        assert len(site.attempts(job_id)) == 1
        assert len(site.adapters()) == 1
        assert not listens_to_remote_control(redis_url)
        worker.terminate()
        assert worker.wait(WAIT_SECONDS) == 0, site.log()
        assert list((site.settings.work_dir() / "trainers").iterdir()) == []


@pytest.mark.slow
def test_the_api_server_notifies_about_a_job_whose_message_was_lost(tmp_path: Path, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    with worker_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu") as site:
        job_id = site.submit(site.upload(12), max_steps=3)  # sends no notification
        site.start(NOTIFIED_ONLY)

        site.start([sys.executable, "-m", "api", "serve", "--port", "0"], LORRY_PEPPER=PEPPER)

        site.wait_for_end(job_id)
        assert site.job(job_id).state == JobState.SUCCEEDED, site.log()


@pytest.mark.slow
def test_a_terminated_worker_releases_its_job_which_ends_with_the_same_bytes(tmp_path: Path, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    with worker_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu") as site:
        rows, command = site.upload(20), [*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"]
        disturbed = site.submit(rows, max_steps=12, checkpoint_every_steps=1000)
        worker = site.start(command, FAILPOINT=f"step_6:wait={site.gate('leave')}")
        notify(site, ("lorry.work",))
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
        notify(site, ("lorry.work",))
        site.wait_for_end(disturbed, undisturbed)
        assert site.job(disturbed).state == JobState.SUCCEEDED, site.log()
        assert [attempt.reason for attempt in site.attempts(disturbed)] == [EndReason.DRAINED, EndReason.COMPLETED]
        assert site.attempts(disturbed)[1].resumed_from_step == 6
        assert site.weights_digest(disturbed) == site.weights_digest(undisturbed)


@pytest.mark.slow
def test_a_worker_claims_jobs_during_a_redis_outage_and_reconnects_after_it(tmp_path: Path) -> None:
    with restartable_redis() as (url, server), worker_site(tmp_path, LORRY_REDIS_URL=url, LORRY_DEVICE="cpu") as site:
        rows = site.upload(12)
        first = site.submit(rows, max_steps=3)
        worker = site.start([*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"])
        notify(site, ("lorry.work",))
        site.wait_for_end(first)
        server.kill()
        meanwhile = site.submit(rows, max_steps=3)

        site.wait_for_end(meanwhile)

        assert site.job(meanwhile).state == JobState.SUCCEEDED, site.log()
        assert site.reasons(meanwhile) == [EndReason.COMPLETED]
        server.start()
        notify(site, ("lorry.work",))
        site.wait_until(lambda: waiting_messages(url) == 0)
        server.kill()
        worker.terminate()
        assert worker.wait(WAIT_SECONDS) == 0, site.log()
        assert workers.list_workers(site.db)[0].ended_at is not None


@pytest.mark.slow
def test_a_worker_without_redis_saves_its_polled_job_when_terminated(tmp_path: Path) -> None:
    with (
        closed_port() as port,
        worker_site(tmp_path, LORRY_REDIS_URL=f"redis://127.0.0.1:{port}/0", LORRY_DEVICE="cpu") as site,
    ):
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


def test_a_drained_celery_worker_exits(tmp_path: Path, redis_url: str) -> None:
    with bare_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu") as site:
        worker = site.start([*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"])
        site.wait_until(lambda: workers.list_workers(site.db))

        cordons.drain(site.db, workers.list_workers(site.db)[0].id)

        assert worker.wait(WAIT_SECONDS) == 0, site.log()
        assert workers.list_workers(site.db)[0].ended_at is not None


def test_an_incompatible_celery_worker_exits_before_it_takes_a_message(tmp_path: Path, redis_url: str) -> None:
    with bare_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu") as site:
        with site.db.write() as session:
            session.execute(update(revisions.VERSIONS).values(version_num=LATER))

        worker = site.start([*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"])

        assert worker.wait(WAIT_SECONDS) == UNFIT, site.log()
        assert f"is at revision {LATER}, which is newer. Install the service's version" in site.log()
        assert workers.list_workers(site.db, ended_within_seconds=0) == []


def test_celerys_own_command_starts_no_gang_worker(tmp_path: Path, redis_url: str) -> None:
    gang = {"LORRY_GANG": "hall", "LORRY_ADVERTISE_ADDRESS": "127.0.0.1"}
    with bare_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu", **gang) as site:
        worker = site.start([*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"])

        assert worker.wait(WAIT_SECONDS) == UNFIT, site.log()
        assert "Start it with `lorry worker`" in site.log()
        assert workers.list_workers(site.db) == []
