"""Background work of the API server: lease expiry, worker notifications, garbage collection and restarts."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from itertools import islice

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.background import periodic
from api.background.periodic import PERIODIC, keep_running
from api.deps import Services
from api.streaming.hub import Feed
from catalog.audit import chain
from catalog.error_texts import ErrorText
from catalog.errors import InvalidRequest, Unavailable
from catalog.lifecycle import deadlines, recovery
from catalog.storage.manifest import DamagedArtifact
from catalog.sweeps import controller
from catalog.tables.fleet import DatabaseHeartbeat
from catalog.tables.jobs import Job
from catalog.tables.storage import File
from tests.api.site import running, until
from tests.catalog.world import World


class CountingNotifier:
    """Counts its notifications."""

    def __init__(self) -> None:
        self.count = 0

    def wake_workers(self) -> None:
        self.count += 1

    def close(self) -> None:
        return


@pytest.fixture
def notifier() -> CountingNotifier:
    return CountingNotifier()


@pytest.fixture
def notifying(services: Services, notifier: CountingNotifier) -> Services:
    return dataclasses.replace(services, notifier=notifier)


def run_all(services: Services) -> None:
    for each in PERIODIC:
        each.run(services)


def test_job_of_a_lost_worker_is_requeued_and_workers_are_notified(
    notifying: Services, notifier: CountingNotifier, world: World
) -> None:
    world.worker()
    claim = world.running()
    recovery.expire(world.db, lease_seconds=60)
    with world.db.write() as session:
        job = session.get_one(Job, claim.job.id)
        job.lease_expires_at, job.lease_extended = 1.0, True
        session.get_one(DatabaseHeartbeat, 1)

    run_all(notifying)

    assert world.job(claim.job.id).state == "queued"
    assert world.job(claim.job.id).claim_id is None
    waiting = world.submit()
    run_all(notifying)
    assert waiting.state == "validating_files"
    assert notifier.count >= 1


def test_workers_are_not_notified_while_nothing_waits(
    notifying: Services, notifier: CountingNotifier, world: World
) -> None:
    run_all(notifying)

    assert notifier.count == 0


def test_unavailable_database_does_not_stop_the_loop(
    notifying: Services, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object, **__: object) -> int:
        raise Unavailable("database_unavailable")

    def crash(*_: object, **__: object) -> int:
        raise RuntimeError("odd")

    for failing in (away, crash):
        monkeypatch.setattr(recovery, "expire", failing)
        with caplog.at_level(logging.WARNING):
            run_all(notifying)

    assert "database_unavailable" in caplog.text
    assert "odd" in caplog.text


def test_failed_task_does_not_prevent_the_others(
    notifying: Services,
    notifier: CountingNotifier,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def crash(*_: object, **__: object) -> int:
        raise InvalidRequest(ErrorText(code="odd", message="odd", remedy=""))

    world.submit()
    for module, act in ((recovery, "expire"), (controller, "advance"), (deadlines, "notify_late")):
        monkeypatch.setattr(module, act, crash)
    with caplog.at_level(logging.WARNING):
        run_all(notifying)

    assert notifier.count == 1
    assert chain.check(world.db, peppers=[notifying.pepper.current]).num_unsealed == 0
    named = ("recover", "notify_missed_deadlines", "advance_sweeps")
    of_loop = [record.message for record in caplog.records if record.name == "lorry.api"]
    assert of_loop == [f"crash in {act}" for act in named]
    assert caplog.text.count("Traceback") == 3


def test_created_and_resumed_jobs_notify_workers_immediately(
    services: Services, notifying: Services, notifier: CountingNotifier, client: TestClient, world: World
) -> None:
    app = client.app
    app.state.services = notifying  # pyright: ignore[reportAttributeAccessIssue,reportFunctionMemberAccess]
    body = {"model": "smol", "training_file": world.file_id}

    job_id = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    after_creation = notifier.count
    client.post(f"/v1/fine_tuning/jobs/{job_id}/pause")
    client.post(f"/v1/fine_tuning/jobs/{job_id}/resume")

    assert (after_creation, notifier.count) == (1, 2)


def test_old_unreferenced_blobs_are_deleted_and_referenced_ones_stay(services: Services, world: World) -> None:
    named, orphan = services.store.put_bytes(b"named"), services.store.put_bytes(b"orphan")
    with world.db.write() as session:
        session.get_one(File, world.file_id).digest = named.digest
    for path in (services.settings.data_dir / "store").rglob("*"):
        os.utime(path, (1.0, 1.0))

    run_all(services)

    assert b"".join(services.store.open_blob(named.digest)) == b"named"
    with pytest.raises(DamagedArtifact):
        list(services.store.open_blob(orphan.digest))


def test_crashed_background_task_is_logged_counted_and_restarted(
    services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    runs, waits = list[int](), list[float]()

    async def run() -> None:
        runs.append(len(runs))
        if len(runs) < 3:
            raise RuntimeError("odd")

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    asyncio.run(keep_running("streams", run, services.telemetry, sleep=sleep))

    assert len(runs) == 3
    assert waits == [periodic.RESTART_SECONDS] * 2
    assert caplog.text.count("crash in the background task streams") == 2
    restarts = services.telemetry.registry.get_sample_value("lorry_background_restarts_total", {"task": "streams"})
    assert restarts == 2


@pytest.mark.parametrize("part", ["_recheck", "_beat"])
def test_live_streams_survive_a_crash_of_their_feed(
    app: FastAPI, key: str, world: World, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    original, crashes = getattr(Feed, part), list[str]()

    async def crash_once(feed: Feed) -> None:
        if not crashes:
            crashes.append(part)
            raise RuntimeError("odd")
        await original(feed)

    monkeypatch.setattr(Feed, part, crash_once)
    monkeypatch.setattr(periodic, "RESTART_SECONDS", 0.0)
    job = world.submit()
    with (
        running(app, key) as site,
        site.http() as client,
        client.stream("GET", f"/v1/fine_tuning/jobs/{job.id}/stream") as response,
    ):
        lines = islice(response.iter_lines(), 500)  # includes the comments of an idle stream
        assert any(line.startswith("event: job") for line in lines)
        until(lambda: crashes)
        client.post(f"/v1/fine_tuning/jobs/{job.id}/cancel")
        assert any('"status":"cancelled"' in line for line in lines)
