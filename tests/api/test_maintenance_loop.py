"""What the api does besides answering: expired leases end, and the bell rings while something waits."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from itertools import islice

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api import maintenance_loop
from api.deps import Services
from api.maintenance_loop import advance_once, clean_once, keep_running, look_once
from api.streaming.hub import Feed
from catalog.audit import chain
from catalog.errors import InvalidRequest, Unavailable
from catalog.lifecycle import deadlines, recovery
from catalog.storage.manifest import DamagedArtifact
from catalog.sweeps import controller
from catalog.tables.fleet import DatabaseHeartbeat
from catalog.tables.jobs import Job
from catalog.tables.storage import File
from tests.api.site import running, until
from tests.catalog.world import World


class Bell:
    """Counts."""

    def __init__(self) -> None:
        self.rings = 0

    def ring(self) -> None:
        self.rings += 1

    def close(self) -> None:
        return


@pytest.fixture
def bell() -> Bell:
    return Bell()


@pytest.fixture
def belled(services: Services, bell: Bell) -> Services:
    return dataclasses.replace(services, doorbell=bell)


def test_a_job_whose_worker_was_lost_goes_back_to_the_queue_and_the_bell_rings(
    belled: Services, bell: Bell, world: World
) -> None:
    world.worker()
    claim = world.running()
    recovery.expire(world.db, lease_seconds=60)
    with world.db.write() as session:
        job = session.get_one(Job, claim.job.id)
        job.lease_expires_at, job.lease_extended = 1.0, True
        session.get_one(DatabaseHeartbeat, 1)

    look_once(belled)

    assert world.job(claim.job.id).state == "queued"
    assert world.job(claim.job.id).claim_id is None
    waiting = world.submit()
    look_once(belled)
    assert waiting.state == "validating_files"
    assert bell.rings >= 1


def test_the_bell_is_silent_while_nothing_waits(belled: Services, bell: Bell, world: World) -> None:
    look_once(belled)

    assert bell.rings == 0


def test_an_absent_database_does_not_end_the_watch(
    belled: Services, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object, **__: object) -> int:
        raise Unavailable("Away.", code="database_unavailable", remedy="")

    def crash(*_: object, **__: object) -> int:
        raise RuntimeError("odd")

    for failing in (away, crash):
        monkeypatch.setattr(recovery, "expire", failing)
        with caplog.at_level(logging.WARNING):
            look_once(belled)

    assert "database_unavailable" in caplog.text
    assert "odd" in caplog.text


def test_an_act_that_fails_keeps_no_other_from_running(
    belled: Services,
    bell: Bell,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def crash(*_: object, **__: object) -> int:
        raise InvalidRequest("odd", code="odd", remedy="")

    world.submit()
    for module, act in ((recovery, "expire"), (controller, "advance"), (deadlines, "tell_late")):
        monkeypatch.setattr(module, act, crash)
    with caplog.at_level(logging.WARNING):
        advance_once(belled)
        look_once(belled)

    assert bell.rings == 1
    assert chain.check(world.db, peppers=[belled.pepper.current]).num_unsealed == 0
    named = ("advance_sweeps", "recover", "notify_missed_deadlines")
    assert [record.message for record in caplog.records] == [f"crash in {act}" for act in named]
    assert caplog.text.count("Traceback") == 3


def test_a_new_job_and_a_resumed_one_ring_at_once(
    services: Services, belled: Services, bell: Bell, client: TestClient, world: World
) -> None:
    app = client.app
    app.state.services = belled  # pyright: ignore[reportAttributeAccessIssue,reportFunctionMemberAccess]
    body = {"model": "smol", "training_file": world.file_id}

    job_id = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    after_creation = bell.rings
    client.post(f"/v1/fine_tuning/jobs/{job_id}/pause")
    client.post(f"/v1/fine_tuning/jobs/{job_id}/resume")

    assert (after_creation, bell.rings) == (1, 2)


def test_what_nothing_names_is_deleted_once_it_is_old_and_what_is_named_stays(services: Services, world: World) -> None:
    named, orphan = services.store.put_bytes(b"named"), services.store.put_bytes(b"orphan")
    with world.db.write() as session:
        session.get_one(File, world.file_id).digest = named.digest
    for path in (services.settings.data_dir / "store").rglob("*"):
        os.utime(path, (1.0, 1.0))

    clean_once(services)

    assert b"".join(services.store.open_blob(named.digest)) == b"named"
    with pytest.raises(DamagedArtifact):
        list(services.store.open_blob(orphan.digest))


def test_a_background_task_that_crashes_is_logged_counted_and_started_again(
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
    assert waits == [maintenance_loop.RESTART_SECONDS] * 2
    assert caplog.text.count("crash in the background task streams") == 2
    restarts = services.telemetry.registry.get_sample_value("lorry_background_restarts_total", {"task": "streams"})
    assert restarts == 2


@pytest.mark.parametrize("part", ["_recheck", "_beat"])
def test_live_streams_go_on_after_a_crash_of_what_feeds_them(
    app: FastAPI, key: str, world: World, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    as_it_was, crashes = getattr(Feed, part), list[str]()

    async def crash_once(feed: Feed) -> None:
        if not crashes:
            crashes.append(part)
            raise RuntimeError("odd")
        await as_it_was(feed)

    monkeypatch.setattr(Feed, part, crash_once)
    monkeypatch.setattr(maintenance_loop, "RESTART_SECONDS", 0.0)
    job = world.submit()
    with (
        running(app, key) as site,
        site.http() as client,
        client.stream("GET", f"/v1/fine_tuning/jobs/{job.id}/stream") as response,
    ):
        lines = islice(response.iter_lines(), 500)  # with the comments of a silent stream
        assert any(line.startswith("event: job") for line in lines)
        until(lambda: crashes)
        client.post(f"/v1/fine_tuning/jobs/{job.id}/cancel")
        assert any('"status":"cancelled"' in line for line in lines)
