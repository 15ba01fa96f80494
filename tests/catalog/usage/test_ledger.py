"""Usage per day: recorded in the transactions that cause it, and reported without summing over jobs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import func, select

from catalog.db.database import Database
from catalog.errors import InvalidRequest
from catalog.jobs import commands
from catalog.maintenance import garbage_collection
from catalog.queue import claims
from catalog.registry import adapters
from catalog.states import EndReason
from catalog.storage import files
from catalog.tables.jobs import Job
from catalog.tables.storage import File, Prepared
from catalog.tables.tenancy import StoredBytes
from catalog.tenancy import projects
from catalog.usage import ledger
from catalog.usage import report as usage_report
from catalog.usage.ledger import DAY_SECONDS
from catalog.usage.report import Day, UsageQuery, Used
from tests.catalog.world import World

pytestmark = pytest.mark.both_databases

MIDNIGHT = 1_800_057_600.0
"""The start of a day after the start of the world's clock."""


def report_days(world: World, **filters: Any) -> list[Day]:
    return usage_report.report(
        world.db,
        caller=replace(world.caller, is_operator=True),
        query=UsageQuery(**{"start_time": MIDNIGHT, **filters}),
    ).days


def only(days: list[Day]) -> Used:
    """Return our project's usage on the only reported day."""
    (day,) = days
    (used,) = day.used
    return used


@pytest.fixture
def world(world: World) -> World:
    world.clock.now = MIDNIGHT
    return world


def test_device_seconds_of_a_day_equal_the_charges_of_its_jobs(world: World) -> None:
    world.worker()
    claim = world.running()
    world.clock.advance(10)
    world.beat(claim.claim_id)
    world.clock.advance(7)
    world.complete(claim.claim_id)

    used = only(report_days(world, project_ids=["ours"]))

    assert used.amounts["device_seconds"] == pytest.approx(world.job(claim.job.id).device_seconds)
    assert used.amounts["device_seconds"] == pytest.approx(17, abs=0.5)
    assert used.amounts["trained_tokens"] == 5


def test_jobs_are_counted_by_creation_day_and_by_outcome(world: World) -> None:
    claim, failing, waiting = world.running(), world.running(), world.submit()
    world.clock.advance(DAY_SECONDS)
    world.beat(claim.claim_id, failing.claim_id)
    world.complete(claim.claim_id)
    claims.end(world.db, failing.claim_id, reason=EndReason.USER_ERROR, detail="no")
    commands.cancel(world.db, **world.of(waiting.id))

    first, second = (day.used[0].amounts for day in report_days(world, project_ids=["ours"]))

    counted = ("num_created", "num_succeeded", "num_failed", "num_cancelled")
    assert [first[name] for name in counted] == [3, 0, 0, 0]
    assert [second[name] for name in counted] == [0, 1, 1, 1]


def test_usage_is_reported_by_project_and_base_model(world: World) -> None:
    world.base("other")
    world.submit()
    world.submit(model="other")
    world.submit(model="other")
    world.submit(caller=world.stranger, training_file=world.file(caller=world.stranger))

    def created(*group_by: Any, **filters: Any) -> list[tuple[str | None, str | None, float]]:
        (day,) = report_days(world, group_by=group_by, **filters)
        return sorted((used.project_id, used.model, used.amounts["num_created"]) for used in day.used)  # pyright: ignore

    ours, theirs = world.caller.project_id, world.stranger.project_id
    assert created("model") == [(None, "other", 2), (None, "smol", 2)]
    assert created("project_id", "model") == sorted([(ours, "other", 2), (ours, "smol", 1), (theirs, "smol", 1)])
    assert created("project_id", models=["other"]) == [(ours, None, 2)]


def test_stored_bytes_include_files_adapters_and_token_caches(world: World) -> None:
    adapter = world.complete(world.running().claim_id)
    kept, gone, expiring = (_upload(world, size) for size in (1000, 200, 30))
    with world.db.write() as session:
        session.get_one(File, expiring).expires_at = world.clock.now + 5
    mine = world.caller.project_id
    full = _held(world)

    files.delete(world.db, project_id=mine, file_id=gone)
    adapters.delete(world.db, project_id=mine, name=adapter.id)
    world.clock.advance(10)
    garbage_collection.drop_references(world.db)

    curves = _size(world, world.job(adapter.job_id).result_file)
    tokens = _prepared_bytes(world)
    assert full == 1230 + len("adapter") + curves + tokens
    assert _held(world) == 1000 + curves + tokens
    assert kept


def _prepared_bytes(world: World) -> int:
    """Return the bytes of the project's token caches."""
    with world.db.read() as session:
        return session.scalar(select(func.sum(Prepared.num_bytes))) or 0


def test_stored_bytes_are_reported_for_the_end_of_each_day(world: World) -> None:
    _upload(world, 100)
    world.clock.advance(2 * DAY_SECONDS)
    _upload(world, 20)
    _upload(world, 3)
    world.clock.advance(DAY_SECONDS)

    days = report_days(world, project_ids=["ours"], end_time=MIDNIGHT + 6 * DAY_SECONDS)

    assert [[used.stored_bytes for used in day.used] for day in days] == [[100], [100], [123], [123], [], []]
    late = report_days(world, project_ids=["ours"], start_time=MIDNIGHT + 3 * DAY_SECONDS)
    assert [[used.stored_bytes for used in day.used] for day in late] == [[123]]


def test_uncommitted_usage_is_not_recorded(world: World) -> None:
    job = Job(id="x", project_id=world.caller.project_id, base_model="smol")

    with suppress(ValueError), world.db.write() as session:
        ledger.add(session, job, "num_created", 1, now=world.clock.now)
        ledger.store(session, world.caller.project_id, 5, now=world.clock.now)
        raise ValueError

    assert _held(world) == 0
    assert report_days(world)[0].used == []


def test_usage_rolled_back_to_a_savepoint_is_not_recorded(world: World) -> None:
    job = Job(id="x", project_id=world.caller.project_id, base_model="smol")

    with world.db.write() as session:
        ledger.add(session, job, "num_created", 1, now=MIDNIGHT)
        with ledger.savepoint(session) as taken_back:
            ledger.add(session, job, "num_created", 10, now=MIDNIGHT)
            taken_back.rollback()
        with suppress(ValueError), ledger.savepoint(session):
            ledger.add(session, job, "num_created", 100, now=MIDNIGHT)
            raise ValueError
        with ledger.savepoint(session):
            ledger.add(session, job, "num_created", 1000, now=MIDNIGHT)
        ledger.add(session, job, "num_created", 10_000, now=MIDNIGHT)

    assert report_days(world)[0].used[0].amounts["num_created"] == 11_001


def test_days_are_paged(world: World) -> None:
    world.clock.advance(9 * DAY_SECONDS)
    filters = UsageQuery(start_time=MIDNIGHT + 5, num_days=4)

    page = usage_report.report(world.db, caller=world.caller, query=filters)
    last = usage_report.report(world.db, caller=world.caller, query=replace(filters, num_days=31))

    first = ledger.day_of(MIDNIGHT)
    assert [day.day for day in page.days] == list(range(first, first + 4))
    assert page.next_day == first + 4
    assert (last.days[-1].day, last.next_day) == (first + 9, None)
    with pytest.raises(InvalidRequest):
        usage_report.report(world.db, caller=world.caller, query=UsageQuery(start_time=5, end_time=5))
    with pytest.raises(InvalidRequest, match=f"is in the future: the server's current time is {world.clock.now:.0f}"):
        usage_report.report(world.db, caller=world.caller, query=UsageQuery(start_time=world.clock.now + 5))
    with pytest.raises(InvalidRequest, match=f"'page' is '{first + 10}', which is beyond the last page") as beyond:
        usage_report.report(world.db, caller=world.caller, query=replace(filters, page=first + 10))
    assert beyond.value.param == "page"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_concurrent_updates_in_different_orders_do_not_deadlock(db: Database, world: World) -> None:
    world.base("other")
    rows = [Job(id="x", project_id=project, base_model=base) for project in _ids(world) for base in ("smol", "other")]

    def add(ordered: list[Job]) -> None:
        for _ in range(40):
            with db.write() as session:
                for job in ordered:
                    ledger.add(session, job, "num_created", 1, now=MIDNIGHT)
                    ledger.store(session, job.project_id, 1, now=MIDNIGHT)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(add, rows), pool.submit(add, rows[::-1])]:
            done.result()

    assert [used.amounts["num_created"] for used in report_days(world)[0].used] == [160, 160]
    assert _held(world) == 160


def _ids(world: World) -> list[str]:
    return [world.caller.project_id, projects.ensure(world.db, "theirs").id]


def _upload(world: World, num_bytes: int) -> str:
    file = File(id=f"file-{num_bytes}", project_id=world.caller.project_id, purpose="user_data", filename="a")
    file.num_bytes, file.digest = num_bytes, "d"
    with world.db.write() as session:
        return files.show(session, file, lifetime_seconds=None).id


def _held(world: World) -> int:
    with world.db.read() as session:
        mine = StoredBytes.project_id == world.caller.project_id
        return session.scalar(select(StoredBytes.num_bytes).where(mine)) or 0


def _size(world: World, file_id: str | None) -> int:
    assert file_id is not None
    return files.get(world.db, project_id=world.caller.project_id, file_id=file_id).num_bytes
