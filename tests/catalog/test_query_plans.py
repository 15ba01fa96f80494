"""What is asked often is found by an index: no statement reads all of a table that grows with what was ever done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event

from catalog import adapters, artifact_rows, fleet, job_records, jobs, queue, recovery, watching, workers
from catalog import files as catalog_files
from catalog.db import Database
from tests.catalog.world import LEASE, World, manifest

GROWING = ("jobs", "attempts", "events", "metrics", "checkpoints", "prepared", "adapters", "files", "artifacts")
Asked = list[tuple[str, Any]]


@contextmanager
def listening(db: Database) -> Generator[Asked]:
    """Each statement that is sent meanwhile, with its values."""
    asked: Asked = []

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, _context: Any, _many: bool) -> None:
        asked.append((statement, values))

    event.listen(db.engine, "before_cursor_execute", note)
    yield asked
    event.remove(db.engine, "before_cursor_execute", note)


def scanned(db: Database, statement: str, values: Any) -> list[str]:
    """Tables that grow and of which this statement reads every line, as the database plans it."""
    if not re.match(r"\s*(SELECT|UPDATE|DELETE)", statement, re.IGNORECASE):
        return []
    with db.engine.connect() as connection:
        if db.is_sqlite:
            plan = connection.exec_driver_sql(f"explain query plan {statement}", values).all()
            named = [re.match(r"SCAN (\w+)", step.detail) for step in plan]
            return [match[1] for match in named if match is not None and match[1] in GROWING]
        connection.exec_driver_sql("set enable_seqscan = off")  # small tables are scanned by preference
        told = connection.exec_driver_sql(f"explain (format json) {statement}", values).scalar_one()
        return list(_read_whole((told if isinstance(told, list) else json.loads(told))[0]["Plan"]))


def _read_whole(node: dict[str, Any]) -> Generator[str]:
    if node.get("Relation Name") in GROWING and "Index Cond" not in node and node["Node Type"] != "Bitmap Heap Scan":
        yield node["Relation Name"]
    for below in node.get("Plans", ()):
        yield from _read_whole(below)


def everything(world: World) -> dict[str, str]:
    """Two jobs that ended, one that runs and one that waits; ids of what pages go on after."""
    world.worker()
    ended = [world.running() for _ in range(2)]
    made = [world.complete(claim.claim_id, f"adapter {number}") for number, claim in enumerate(ended)]
    running = world.running()
    world.queued()
    return {
        "ended": ended[0].job_id,
        "newest_ended": ended[1].job_id,
        "adapter": made[1].id,
        "running": running.job_id,
        "claim": running.claim_id,
        "file": world.file_id,
        "newest_file": world.file(),
    }


OURS = Callable[[World, dict[str, str]], object]
READS: dict[str, OURS] = {
    "a page of jobs": lambda w, ids: jobs.list_page(w.db, project_id=w.caller.project_id, after=ids["newest_ended"]),
    "a page of files": lambda w, ids: catalog_files.list_page(
        w.db, project_id=w.caller.project_id, after=ids["newest_file"]
    ),
    "a page of adapters": lambda w, ids: adapters.list_page(w.db, project_id=w.caller.project_id, after=ids["adapter"]),
    "a job": lambda w, ids: jobs.get(w.db, **w.of(ids["ended"])),
    "its events": lambda w, ids: job_records.events_page(w.db, **w.of(ids["ended"])),
    "its checkpoints": lambda w, ids: job_records.checkpoints_page(w.db, **w.of(ids["ended"])),
    "its curve": lambda w, ids: job_records.metrics(w.db, **w.of(ids["ended"]), kind="train"),
    "its attempts": lambda w, ids: job_records.attempts(w.db, **w.of(ids["ended"])),
    "its packmates": lambda w, ids: job_records.packmates(w.db, **w.of(ids["ended"])),
    "its seconds": lambda w, ids: job_records.seconds_running(w.db, [ids["ended"], ids["running"]]),
    "what is new of it": lambda w, ids: watching.look(
        w.db, watching.start(w.db, **w.of(ids["running"]), last_seen=None)
    ),
    "why it waits": lambda w, ids: jobs.explain(w.db, **w.of(ids["running"])),
    "the queue": lambda w, _: queue.snapshot(w.db, project_id=w.caller.project_id),
    "the queue of all": lambda w, _: queue.snapshot(w.db, project_id=None),
    "whether there is work": lambda w, _: queue.has_work(w.db),
    "the workers": lambda w, _: fleet.workers(w.db),
    "the same upload": lambda w, ids: catalog_files.same_content(
        w.db, catalog_files.get(w.db, project_id=w.caller.project_id, file_id=ids["file"])
    ),
}
WRITES: dict[str, OURS] = {
    "a submission": lambda w, _: w.submit(),
    "a preparation": lambda w, _: w.queued(),
    "a claim": lambda w, _: w.claim("w2"),
    "a heartbeat": lambda w, ids: w.beat(ids["claim"]),
    "an end": lambda w, ids: w.complete(ids["claim"], "another"),
    "a cancel": lambda w, ids: jobs.cancel(w.db, **w.of(ids["running"])),
    "a pause": lambda w, ids: jobs.pause(w.db, **w.of(ids["running"])),
    "a worker that left": lambda w, _: workers.end_worker(w.db, "w1"),
    "a worker that is lost": lambda w, _: workers.declare_lost(w.db, "w1"),
    "leases that are past": lambda w, _: recovery.expire(w.db, grace_seconds=LEASE),
    "leases after an outage": lambda w, _: (w.clock.turn(10 * LEASE), recovery.expire(w.db, grace_seconds=LEASE)),
    "files that are let go": lambda w, _: _hide(w),
}


def _hide(world: World) -> None:
    with world.db.write() as session:
        artifact_rows.hide_unused(session, manifest("adapter 0").digest)


@pytest.mark.parametrize("what", [*READS, *WRITES])
def test_no_statement_reads_all_of_what_grows(world: World, what: str) -> None:
    ids = everything(world)
    world.worker("w2")

    with listening(world.db) as asked:
        (READS | WRITES)[what](world, ids)

    assert asked
    whole = {statement: tables for statement, values in asked if (tables := scanned(world.db, statement, values))}
    assert whole == {}


def test_a_scan_would_be_seen(world: World) -> None:
    with listening(world.db) as asked, world.db.read() as session:
        session.connection().exec_driver_sql("select id from jobs where trainer_id = 'none'")

    assert [scanned(world.db, *one) for one in asked] == [["jobs"]]
