"""Project quotas: enforced at submission and upload, or by holding jobs in the queue."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import Filters
from catalog.db.database import Database
from catalog.errors import QuotaExceeded, RateLimited
from catalog.jobs import commands, explanation
from catalog.queue import listing
from catalog.registry import adapters
from catalog.settings import Settings
from catalog.storage import files
from catalog.storage import quota as stored_quota
from catalog.storage.store import open_store
from catalog.tables.storage import File
from catalog.tenancy.authentication import Caller
from catalog.usage import quotas
from catalog.usage.ledger import DAY_SECONDS
from catalog.usage.quotas import QuotaStatus
from tests.catalog.db.interleaving import after_statement
from tests.catalog.world import World, sha

MIDNIGHT = 1_800_057_600.0
"""16 January 2027, 00:00 UTC."""
NEXT_MONTH = 1_801_440_000.0


@pytest.fixture
def world(world: World) -> World:
    world.clock.now = MIDNIGHT
    world.worker()
    return world


def limit(world: World, **limits: Any) -> None:
    quotas.limit(world.db, caller=_operator(world), project="ours", limits=limits)  # pyright: ignore[reportArgumentType]


def standing(world: World, name: str) -> QuotaStatus:
    _, found = quotas.statuses(world.db, caller=world.caller, project="ours")
    return next(one for one in found if one.name == name)


def refused(world: World, **fields: Any) -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as refusal:
        world.submit(**fields)
    assert refusal.value.code == "quota_exceeded"
    return refusal.value


def test_queued_jobs_are_limited_until_one_starts(world: World) -> None:
    limit(world, queued_jobs=2)
    world.submit()
    world.queued()

    error = refused(world)

    assert error.quota == {"name": "queued_jobs", "limit": 2, "used": 2, "resets_at": None}
    assert error.message == "Project 'ours' has reached its limit of 2 queued jobs (current usage: 2)."
    assert error.remedy.startswith("Wait until a queued job starts")
    assert "`lorry projects update ours --limit-queued-jobs N`" in error.remedy
    assert error.retry_after_seconds == math.inf
    world.claim()
    world.submit()


@pytest.mark.both_databases
def test_job_that_is_prepared_while_queued_jobs_are_counted_counts_once(world: World) -> None:
    job = world.submit()
    after_statement(world.db, "count(*)", world.prepare_all)

    with world.db.read() as session:
        project = quotas.project_of(session, world.caller.project_id)
        found = quotas.status_of(session, project, "queued_jobs", now=world.clock.now)

    assert (found.used, world.job(job.id).state) == (1, "queued")


def test_limits_of_zero_and_one_are_described_correctly(world: World) -> None:
    limit(world, queued_jobs=1)
    world.submit()
    one = refused(world)
    limit(world, queued_jobs=0)

    none = refused(world)

    assert "its limit of 1 queued job (current usage: 1)" in one.message
    assert "Wait" not in none.remedy
    limit(world, queued_jobs=None, device_hours_per_month=12_345.5)
    assert standing(world, "device_hours_per_month").describe() == "12,345.5 device-hours per month"


def test_resume_is_limited_by_queued_jobs_but_not_by_jobs_per_day(world: World) -> None:
    limit(world, queued_jobs=2, jobs_per_day=4)
    paused = [world.submit() for _ in range(2)]
    for job in paused:
        commands.pause(world.db, **world.of(job.id))
    waiting = [world.submit() for _ in range(2)]

    with pytest.raises(QuotaExceeded) as refusal:
        commands.resume(world.db, **world.of(paused[0].id))

    assert refusal.value.quota == {"name": "queued_jobs", "limit": 2, "used": 2, "resets_at": None}
    assert world.job(paused[0].id).state == "paused"
    commands.cancel(world.db, **world.of(waiting[0].id))
    commands.resume(world.db, **world.of(paused[0].id))
    with pytest.raises(QuotaExceeded):
        commands.resume(world.db, **world.of(paused[1].id))


def test_jobs_per_day_reset_at_midnight_utc(world: World) -> None:
    limit(world, jobs_per_day=2)
    done = [world.submit() for _ in range(2)]
    commands.cancel(world.db, **world.of(done[0].id))

    error = refused(world)

    assert error.quota == {"name": "jobs_per_day", "limit": 2, "used": 2, "resets_at": MIDNIGHT + DAY_SECONDS}
    assert error.retry_after_seconds == pytest.approx(DAY_SECONDS, abs=1)
    assert "the usage resets at 2027-01-17 00:00:00 UTC." in error.remedy
    world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))
    world.clock.now = MIDNIGHT + DAY_SECONDS
    world.submit()


def check_two(world: World, caller: Caller) -> None:
    with world.db.write() as session:
        quotas.check_key(session, caller, num_jobs=2, now=world.clock.now)


def test_jobs_per_day_of_a_key_use_a_rolling_window(world: World) -> None:
    caller = replace(world.caller, service_jobs_per_day=2)
    world.submit(caller=caller)
    world.clock.advance(3600)
    world.submit(caller=caller)

    with pytest.raises(RateLimited, match="2 jobs per day") as refusal:
        world.submit(caller=caller)

    assert refusal.value.retry_after_seconds == pytest.approx(DAY_SECONDS - 3600, abs=1)
    with (
        pytest.raises(RateLimited, match=rf"needs 3 jobs, but API key 'key' \({caller.api_key_id}\) is limited to 2"),
        world.db.write() as session,
    ):
        quotas.check_key(session, caller, num_jobs=3, now=world.clock.now)
    with pytest.raises(RateLimited, match="With the 2 jobs of this request, API key") as several:
        check_two(world, replace(caller, jobs_per_day=3))
    assert ", or request fewer jobs. An operator can raise" in several.value.remedy
    world.submit(caller=replace(caller, jobs_per_day=3))
    world.submit(caller=replace(caller, jobs_per_day=0))
    world.clock.advance(DAY_SECONDS)
    world.submit(caller=caller)


def test_otherwise_rejected_job_does_not_count(world: World) -> None:
    limit(world, jobs_per_day=1)
    with pytest.raises(Exception, match="none"):
        world.submit(model="none")

    world.submit()

    assert standing(world, "jobs_per_day").used == 1


def test_used_up_device_hours_reject_new_jobs_and_hold_queued_ones(world: World) -> None:
    limit(world, device_hours_per_month=0.01)
    claim, waiting = world.running(), world.queued()
    world.pass_time(30, claim.claim_id)
    world.beat(claim.claim_id)
    world.clock.advance(20)
    world.complete(claim.claim_id)

    error = refused(world)
    why = explanation.explain(world.db, **world.of(waiting.id))

    assert error.quota["resets_at"] == NEXT_MONTH
    assert error.quota["used"] == pytest.approx(world.job(claim.job.id).device_seconds / 3600)
    assert "0.01 device-hours per month" in error.message
    assert world.claim() == []
    assert why["explanation"] == (
        "Its project has reached its limit of 0.01 device-hours per month. It waits until the end of the month, or "
        "until an operator raises the limit."
    )
    assert why["quota"]["name"] == "device_hours_per_month"
    world.clock.now = NEXT_MONTH + 1
    assert [claimed.job.id for claimed in world.claim()] == [waiting.id]


def test_project_at_its_concurrency_limit_is_skipped(world: World) -> None:
    limit(world, concurrent_jobs=1)
    first = world.running()
    waiting = world.queued()
    theirs = _of_the_others(world)

    claimed = world.claim("w2", trainer_id="t2")

    why = explanation.explain(world.db, **world.of(waiting.id))
    place = {entry["job_id"]: entry["position"] for entry in listing.snapshot(world.db, project_id=None)["jobs"]}
    assert [claim.job.id for claim in claimed] == [theirs]
    assert "1 concurrent job." in why["explanation"]
    assert why["quota"] == {"name": "concurrent_jobs", "limit": 1, "used": 1, "resets_at": None}
    assert place[waiting.id] is None
    world.complete(first.claim_id)
    assert [claim.job.id for claim in world.claim()] == [waiting.id]


def test_pack_respects_the_concurrency_limit_of_a_project(world: World) -> None:
    limit(world, concurrent_jobs=2)
    mine = [world.queued().id for _ in range(4)]
    theirs = [_of_the_others(world) for _ in range(2)]

    claimed = {claim.job.id for claim in world.claim()}

    assert claimed == {*mine[:2], *theirs}


def test_stored_bytes_are_limited_and_deletion_frees_them(world: World) -> None:
    limit(world, stored_bytes=1000)
    first = upload(world, 700)

    with pytest.raises(QuotaExceeded) as refusal:
        upload(world, 301)
    upload(world, 300)

    assert refusal.value.quota == {"name": "stored_bytes", "limit": 1000, "used": 700, "resets_at": None}
    assert "It already uses 700, and this request needs 301 more." in refusal.value.message
    assert refusal.value.remedy.startswith("Delete files")
    with pytest.raises(QuotaExceeded) as refusal:
        upload(world, 1001)
    assert refusal.value.remedy.startswith("Use smaller files. "), "no deletion helps"
    files.delete(world.db, project_id=world.caller.project_id, file_id=first)
    upload(world, 700)


def test_deleted_bytes_may_use_the_disk_once_more_until_cleanup(world: World) -> None:
    limit(world, stored_bytes=1000)
    for number in range(2):
        file_id = upload(world, 700, content=f"content {number}")
        files.delete(world.db, project_id=world.caller.project_id, file_id=file_id)

    with pytest.raises(QuotaExceeded) as refusal:
        upload(world, 601)
    upload(world, 600)

    assert "It has 0 stored bytes and 1,400 deleted bytes, and this request needs 601 more." in refusal.value.message
    assert "resets at" not in refusal.value.message
    assert refusal.value.remedy.startswith(
        "Wait for the daily garbage collection, which will have freed enough space by "
    )
    assert 0 < refusal.value.retry_after_seconds <= stored_quota.LEAVING_SECONDS
    world.clock.advance(stored_quota.LEAVING_SECONDS)
    upload(world, 400)


def test_rejection_states_when_deleted_bytes_are_freed(world: World) -> None:
    limit(world, stored_bytes=1000)
    start = world.clock.now
    for seconds, (num_bytes, content) in enumerate([(900, "a"), (100, "b"), (900, "a"), (300, "c")]):
        world.clock.now = start + seconds
        file_id = upload(world, num_bytes, content=content)
        files.delete(world.db, project_id=world.caller.project_id, file_id=file_id)

    leave_at: list[float] = []
    for num_bytes in (800, 1000):
        with pytest.raises(QuotaExceeded) as refusal:
            upload(world, num_bytes)
        leave_at.append(world.clock.now + refusal.value.retry_after_seconds - stored_quota.LEAVING_SECONDS)

    assert leave_at == pytest.approx(
        [start + 1, start + 2], rel=0, abs=0.5
    )  # first those of b, then those of a, which was stored again


def test_same_content_deleted_repeatedly_counts_once(world: World) -> None:
    limit(world, stored_bytes=1000)

    for _ in range(4):
        file_id = upload(world, 1000, content="the same")
        files.delete(world.db, project_id=world.caller.project_id, file_id=file_id)


def test_file_beyond_the_storage_quota_leaves_nothing_in_the_store(world: World, tmp_path: Path) -> None:
    limit(world, stored_bytes=3)
    spooled = tmp_path / "spooled"
    spooled.write_bytes(b"four")
    store = open_store(Settings(data_dir=tmp_path))
    fields: dict[str, Any] = {"purpose": "user_data", "filename": "a", "num_bytes": 4, "digest": sha("four")}

    with pytest.raises(QuotaExceeded):
        files.create(
            world.db, store, project_id=world.caller.project_id, spooled=spooled, settings=Settings(), **fields
        )

    assert list(store.objects.list_all("blobs")) == []


def test_first_quota_check_does_not_wait_for_a_lock(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL the wait would protect nothing, because outside a transaction a lock ends with its statement."""
    limit(world, stored_bytes=1000)
    spooled, locked = tmp_path / "spooled", list[str]()
    spooled.write_bytes(b"four")
    store = open_store(Settings(data_dir=tmp_path))
    fields: dict[str, Any] = {"purpose": "user_data", "filename": "a", "num_bytes": 4, "digest": sha("four")}

    def noted(session: Session, name: str) -> None:
        locked.append(name)
        assert session.connection().get_execution_options().get("lorry_immediate"), "not in a writing transaction"

    monkeypatch.setattr(stored_quota, "serialize", noted)
    files.create(world.db, store, project_id=world.caller.project_id, spooled=spooled, settings=Settings(), **fields)

    assert locked == [f"quota {world.caller.project_id}"]


def test_job_outputs_are_stored_beyond_the_limit(world: World) -> None:
    claim = world.running()
    limit(world, stored_bytes=1)

    adapter = world.complete(claim.claim_id)

    assert standing(world, "stored_bytes").is_reached
    adapters.delete(world.db, project_id=world.caller.project_id, name=adapter.id)


def test_limits_are_set_individually_removed_and_audited(world: World) -> None:
    limit(world, queued_jobs=0, jobs_per_day=5)
    limit(world, queued_jobs=None)

    _, found = quotas.statuses(world.db, caller=world.caller, project="ours")
    events = log.list_page(world.db, caller=world.caller, filters=Filters(types=["project.updated"])).items

    assert {one.name: one.limit for one in found if one.limit is not None} == {"jobs_per_day": 5, "plans_per_day": 500}
    assert [event.details for event in events] == [
        {"limits": {"queued_jobs": None}},
        {"limits": {"queued_jobs": 0, "jobs_per_day": 5}},
    ]
    world.submit()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_concurrent_submissions_do_not_exceed_a_limit(db: Database, world: World) -> None:
    limit(world, queued_jobs=3)

    def submit(seed: int) -> bool:
        try:
            world.submit(seed=seed)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        accepted = list(pool.map(submit, range(8)))

    assert accepted.count(True) == 3


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_concurrent_claims_do_not_exceed_a_limit(db: Database, world: World) -> None:
    limit(world, concurrent_jobs=3)
    for number in range(6):
        world.base(f"base-{number}")
        world.queued(model=f"base-{number}")

    def claim(number: int) -> int:
        return len(world.claim(f"w{number}", trainer_id=f"t{number}"))

    with ThreadPoolExecutor(4) as pool:
        claimed = sum(pool.map(claim, range(8)))

    assert claimed == 3


def _operator(world: World) -> Caller:
    return replace(world.caller, is_operator=True)


def _of_the_others(world: World) -> str:
    job = world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))
    world.prepare_all()
    return job.id


def upload(world: World, num_bytes: int, *, content: str = "d") -> str:
    file = File(id=f"file-{num_bytes}-{world.clock.now}", project_id=world.caller.project_id, purpose="user_data")
    file.filename, file.num_bytes, file.digest = "a", num_bytes, sha(content)
    with world.db.write() as session:
        return files.show(session, file, lifetime_seconds=None).id


def files_of(world: World) -> dict[str, str]:
    return {"training_file": world.file_id, "validation_file": world.file_id}
