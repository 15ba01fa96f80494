"""The doorbell on a real Redis: a ring is all that a message is."""

from __future__ import annotations

import json
import sys
import uuid
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy import update

from catalog import cordons, fitness, workers
from catalog.states import EndReason, JobState
from tests.worker_site import WAIT_SECONDS, WorkerSite, bare_site, worker_site
from worker.context import UNFIT

pytestmark = pytest.mark.timeout(600)
WORKER = [sys.executable, "-m", "celery", "-A", "worker.celery_app", "worker", "--without-gossip", "--without-mingle"]


def ring(site: WorkerSite, *messages: tuple[object, ...]) -> None:
    """Send in a child, as the api does from its own process: of each message the name, and its arguments."""
    program = f"""
from worker.celery_app import app
for name, *arguments in {messages!r}:
    app.send_task(name, args=arguments)
"""
    assert site.start([sys.executable, "-c", program]).wait(60) == 0, site.log()


def waiting_messages(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        return int(client.llen("lorry:lorry"))  # pyright: ignore[reportArgumentType]


def test_one_ring_a_hundred_times_and_forged_ones_make_one_attempt(tmp_path: Path, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    with worker_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu") as site:
        job_id = site.submit(site.upload(12), max_steps=3)
        forged = ("lorry.work", "ftjob-forged", {"claim_id": "mine"})
        unknown = (f"os.system.{uuid.uuid4().hex}", json.dumps({"job": job_id}))
        ring(site, *[("lorry.work",)] * 100, forged, unknown)
        worker = site.start([*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"], LORRY_STANDBY_TRAINER="true")

        site.wait_for_end(job_id)
        site.wait_until(lambda: waiting_messages(redis_url) == 0)
        site.wait_until(site.standing_by)

        assert site.job(job_id).state == JobState.SUCCEEDED, site.log()
        assert len(site.attempts(job_id)) == 1
        assert len(site.adapters()) == 1
        worker.terminate()
        assert worker.wait(60) == 0, site.log()
        assert list((site.settings.work_dir() / "trainers").iterdir()) == []


def test_the_next_look_rings_for_a_job_whose_ring_was_lost(tmp_path: Path, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    with worker_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu") as site:
        job_id = site.submit(site.upload(12), max_steps=3)
        site.start([*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"])

        ring(site, ("lorry.look",))

        site.wait_for_end(job_id)
        assert site.job(job_id).state == JobState.SUCCEEDED, site.log()


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
            session.execute(update(fitness.REVISIONS).values(version_num="9999"))

        worker = site.start([*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"])

        assert worker.wait(WAIT_SECONDS) == UNFIT, site.log()
        assert "it is at 9999, a newer one. Install the service's version" in site.log()
        assert workers.list_workers(site.db, ended_within_seconds=0) == []


def test_celerys_own_command_starts_no_worker_of_a_gang(tmp_path: Path, redis_url: str) -> None:
    gang = {"LORRY_GANG": "hall", "LORRY_ADVERTISE_ADDRESS": "127.0.0.1"}
    with bare_site(tmp_path, LORRY_REDIS_URL=redis_url, LORRY_DEVICE="cpu", **gang) as site:
        worker = site.start([*WORKER, "-c", "1", "-Q", "lorry", "-l", "warning"])

        assert worker.wait(WAIT_SECONDS) == UNFIT, site.log()
        assert "start it by `lorry worker`" in site.log()
        assert workers.list_workers(site.db) == []
