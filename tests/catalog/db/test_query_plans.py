"""Frequent statements use an index: none reads the whole of a table that grows with the history."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sqlalchemy import event

from catalog import revocation
from catalog.audit import chain, log
from catalog.audit.log import Filters
from catalog.caller import Caller
from catalog.db.database import Database
from catalog.fleet import cordons, metrics, views, workers
from catalog.history import changes, job_logs, result_files, tracker_runs
from catalog.history import queries as history_queries
from catalog.jobs import commands as job_commands
from catalog.jobs import explanation, submission
from catalog.lifecycle import deadlines, queue_position, recording, recovery
from catalog.maintenance import garbage_collection
from catalog.plans import plans
from catalog.queue import claims as queue_claims
from catalog.queue import listing, notifier, preemption
from catalog.registry import adapters, permissions
from catalog.scheduling.snapshot import USUAL
from catalog.states import EndReason
from catalog.storage import files as catalog_files
from catalog.storage import multipart_uploads
from catalog.storage.manifest import hide_unused
from catalog.sweeps import controller, creation
from catalog.sweeps import queries as sweep_commands
from catalog.sweeps import queries as sweep_queries
from catalog.tables.table import Table
from catalog.tables.tenancy import ApiKey
from catalog.tenancy import api_keys, authentication
from catalog.usage import quotas
from catalog.usage import report as usage_report
from catalog.webhooks import delivery_log, delivery_queue
from tests.catalog.aged_database import (
    FAR,
    GROWING,
    add_parts,
    fill_with_history,
    of_sweep,
    owner,
    send,
    write_tracker_runs,
)
from tests.catalog.plan_data import plan
from tests.catalog.plan_data import ready as ready_plan
from tests.catalog.world import LEASE, PEPPER, WIDE, World, begin_plan, manifest

ONE = replace(WIDE, max_jobs=1)
Statements = list[tuple[str, Any]]
PARTIAL = {
    index.name
    for table in Table.metadata.sorted_tables
    for index in table.indexes
    if index.dialect_options["sqlite"]["where"] is not None
}
"""Partial indexes. A full scan of one reads only its part of the table."""


@contextmanager
def listening(db: Database) -> Generator[Statements]:
    """Collect each statement that is sent meanwhile, with its values. For a batch, the values are the first ones."""
    sent: Statements = []

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, _context: Any, _many: bool) -> None:
        sent.append((statement, values[0] if isinstance(values, list) else values))

    event.listen(db.engine, "before_cursor_execute", note)
    yield sent
    event.remove(db.engine, "before_cursor_execute", note)


def read_whole(db: Database, statement: str, values: Any) -> list[str]:
    """Return the growing tables that the statement reads completely, according to the database's query plan."""
    if not re.match(r"\s*(SELECT|UPDATE|DELETE)", statement, re.IGNORECASE):
        return []
    with db.engine.connect() as connection:
        if db.is_sqlite:
            plan = connection.exec_driver_sql(f"explain query plan {statement}", values).all()
            named = [re.match(r"SCAN (\w+)(?: USING (?:COVERING )?INDEX (\w+))?", step.detail) for step in plan]
            return [match[1] for match in named if match and match[1] in GROWING and match[2] not in PARTIAL]
        explained = connection.exec_driver_sql(f"explain (format json) {statement}", values).scalar_one()
        return list(_in_plan((explained if isinstance(explained, list) else json.loads(explained))[0]["Plan"]))


def _in_plan(node: dict[str, Any]) -> Generator[str]:
    is_read = node["Node Type"] not in ("ModifyTable", "Bitmap Heap Scan")
    is_part = "Index Cond" in node or node.get("Index Name") in PARTIAL
    if is_read and node.get("Relation Name") in GROWING and not is_part:
        yield node["Relation Name"]
    for below in node.get("Plans", ()):
        yield from _in_plan(below)


Act = Callable[[World, dict[str, str]], object]
ACTS: dict[str, Act] = {
    "a page of jobs": lambda w, ids: job_commands.list_page(w.db, project_id=w.caller.project_id, after=ids["ended"]),
    "jobs with a pair and a tag": lambda w, _: job_commands.list_page(
        w.db, project_id=w.caller.project_id, metadata={"team": "search"}, tags=["nightly"]
    ),
    "jobs without metadata": lambda w, _: job_commands.list_page(w.db, project_id=w.caller.project_id, metadata={}),
    "a page of files": lambda w, ids: catalog_files.list_page(w.db, project_id=w.caller.project_id, after=ids["file"]),
    "a page of adapters": lambda w, ids: adapters.list_page(w.db, project_id=w.caller.project_id, after=ids["adapter"]),
    "adapters shared with a project": lambda w, _: adapters.list_page(
        w.db, project_id=w.stranger.project_id, shared=True
    ),
    "a shared adapter": lambda w, ids: adapters.get(w.db, project_id=w.stranger.project_id, name=ids["adapter"]),
    "a checkpoint as a model": lambda w, ids: adapters.get(
        w.db, project_id=w.caller.project_id, name=ids["checkpoint"]
    ),
    "permissions on a model": lambda w, ids: permissions.list_page(w.db, model=ids["checkpoint"]),
    "recording checkpoints": lambda w, ids: [
        recording.record_checkpoint(w.db, ids["claim"], step=step, artifact=manifest(f"c{step}")) for step in (1, 2, 3)
    ],
    "a page of keys": lambda w, _: api_keys.list_page(w.db, caller=w.caller, after=w.caller.api_key_id),
    "authentication of a key": lambda w, _: authentication.authenticate(w.db, secret=_new_secret(w), pepper=PEPPER),
    "a job": lambda w, ids: job_commands.get(w.db, **w.of(ids["ended"])),
    "events of a job": lambda w, ids: history_queries.events_page(w.db, **w.of(ids["ended"])),
    "checkpoints of a job": lambda w, ids: history_queries.checkpoints_page(w.db, **w.of(ids["ended"])),
    "metrics at checkpoints": lambda w, ids: history_queries.points_at(w.db, **w.of(ids["ended"]), steps=[1]),
    "a curve of a job": lambda w, ids: history_queries.metrics(w.db, **w.of(ids["ended"]), kind="train"),
    "a thinned curve": lambda w, ids: history_queries.metrics(w.db, **w.of(ids["ended"]), kind="train", max_points=100),
    "first step of a curve": lambda w, ids: history_queries.first_step(w.db, **w.of(ids["ended"])),
    "recording metrics": lambda w, ids: recording.record_metrics(
        w.db, ids["claim"], [{"kind": kind, "step": 3, "loss": 1.0} for kind in ("train", "valid")]
    ),
    "curves as a file": lambda w, ids: list(result_files.lines(w.db, ids["ended"])),
    "a part of an upload": lambda w, ids: add_parts(w, ids["upload"]),
    "canceling an upload": lambda w, ids: multipart_uploads.cancel(
        w.db, project_id=w.caller.project_id, upload_id=ids["upload"]
    ),
    "attempts of a job": lambda w, ids: history_queries.attempts(w.db, **w.of(ids["ended"])),
    "packmates of a job": lambda w, ids: history_queries.packmates(w.db, **w.of(ids["ended"])),
    "running seconds of jobs": lambda w, ids: history_queries.seconds_running(w.db, [ids["ended"], ids["running"]]),
    "changes of one job": lambda w, ids: changes.poll(
        w.db, changes.start(w.db, **w.of(ids["running"]), last_seen=None)
    ),
    "changes of many jobs": lambda w, ids: changes.poll_many(
        w.db, {(w.caller.project_id, ids[name]): changes.WatchedJob(seq=0) for name in ("ended", "running", "first")}
    ),
    "the newest event": lambda w, _: changes.newest_event(w.db),
    "explanation of a queued job": lambda w, ids: explanation.explain(w.db, **w.of(ids["first"])),
    "explanation of a running job": lambda w, ids: explanation.explain(w.db, **w.of(ids["running"])),
    "explanation of an unprepared job": lambda w, _: explanation.explain(w.db, **w.of(w.submit().id)),
    "the queue of a project": lambda w, _: listing.snapshot(w.db, project_id=w.caller.project_id),
    "the queue of all projects": lambda w, _: listing.snapshot(w.db, project_id=None),
    "check for pending work": lambda w, _: notifier.has_work(w.db),
    "the workers": lambda w, _: views.workers(w.db),
    "check for a faulty node": lambda w, _: cordons._cordon_if_bad(w.db, w.worker("new")),  # pyright: ignore[reportPrivateUsage]
    "metrics of the fleet": lambda w, _: metrics.read(w.db),
    "creating a plan": lambda w, _: plan(w),
    "a plan that is ready": lambda w, _: ready_plan(w, lora={"rank": 4}),
    "details of a plan": lambda w, ids: plans.details(
        w.db, plans.get(w.db, project_id=w.caller.project_id, plan_id=ids["plan"])
    ),
    "a page of plans": lambda w, ids: plans.list_page(w.db, project_id=w.caller.project_id, after=ids["plan"]),
    "claiming a plan": lambda w, _: begin_plan(w.db, "w1"),
    "deleting a plan": lambda w, ids: plans.delete(w.db, project_id=w.caller.project_id, plan_id=ids["plan"]),
    "finding a duplicate file": lambda w, ids: catalog_files.same_content(
        w.db, catalog_files.get(w.db, project_id=w.caller.project_id, file_id=ids["file"])
    ),
    "a page of sweeps": lambda w, ids: sweep_queries.list_page(
        w.db, project_id=w.caller.project_id, after=ids["sweep"]
    ),
    "a sweep": lambda w, ids: sweep_queries.get(w.db, **of_sweep(w, ids)),
    "leaderboard of a sweep": lambda w, ids: sweep_queries.leaderboard(w.db, **of_sweep(w, ids)),
    "a trial": lambda w, ids: sweep_queries.trial(w.db, **of_sweep(w, ids), number=0),
    "trial metrics at a rung": lambda w, ids: recording.record_metrics(
        w.db, ids["trial"], [{"kind": "valid", "step": 3, "loss": 1.0}]
    ),
    "completing a trial": lambda w, ids: w.complete(ids["trial"], "of a trial"),
    "stopping a trial": lambda w, ids: sweep_commands.stop_trial(w.db, **of_sweep(w, ids), number=1),
    "canceling a sweep": lambda w, ids: sweep_commands.cancel(w.db, **of_sweep(w, ids)),
    "advancing a sweep": lambda w, _: controller.advance(w.db),
    "advancing a sweep to its end": lambda w, ids: (
        queue_claims.end(w.db, ids["another trial"], reason=EndReason.CANCELLED_BY_USER, detail="Cancelled."),
        controller.advance(w.db),
    ),
    "advancing without work": lambda w, _: controller.advance(w.db),
    "an adapter by its sweep": lambda w, ids: adapters.get(w.db, project_id=w.caller.project_id, name=ids["sweep"]),
    "a submission": lambda w, _: w.submit(),
    "quota check of a key": lambda w, _: _check_key(w),
    "preparing files": lambda w, _: w.prepare_all(),
    "a heartbeat": lambda w, ids: w.beat(ids["claim"]),
    "requesting a cancellation": lambda w, ids: job_commands.cancel(w.db, **w.of(ids["running"])),
    "completing a job": lambda w, ids: w.complete(ids["claim"], "another"),
    "canceling a queued job": lambda w, ids: job_commands.cancel(w.db, **w.of(ids["first"])),
    "a pause": lambda w, ids: job_commands.pause(w.db, **w.of(ids["second"])),
    "a resume": lambda w, ids: job_commands.resume(w.db, **w.of(ids["second"])),
    "a hold": lambda w, ids: queue_position.hold(w.db, **w.of(ids["second"])),
    "a release": lambda w, ids: queue_position.release(w.db, **w.of(ids["second"])),
    "a move": lambda w, ids: queue_position.move_to(
        w.db, **w.of(ids["second"]), target=queue_position.MoveTarget(to="last")
    ),
    "reporting missed deadlines": lambda w, _: deadlines.notify_late(w.db),
    "a preemption decision": lambda w, _: (
        w.queued(priority="urgent"),
        w.clock.advance(60),
        preemption.request_preemptions(w.db, policy=USUAL),
    ),
    "claiming a job that joins": lambda w, ids: w.claim("w1", ONE, pack_key=w.job(ids["running"]).pack_key),
    "claiming for a loaded base model": lambda w, ids: w.claim(
        "w2", replace(ONE, resident_key=w.job(ids["running"]).pack_key)
    ),
    "a claim": lambda w, _: w.claim("w2"),
    "expiring leases": lambda w, _: recovery.expire(w.db, lease_seconds=LEASE),
    "expiring leases after an outage": lambda w, _: (
        w.clock.advance(10 * LEASE),
        recovery.expire(w.db, lease_seconds=LEASE),
    ),
    "ending a worker": lambda w, _: workers.end_worker(w.db, "w2"),
    "a lost worker": lambda w, _: workers.declare_lost(w.db, "w1"),
    "a page of the audit log": lambda w, _: log.list_page(w.db, caller=w.caller, filters=Filters()),
    "a page of the audit log of all projects": lambda w, _: log.list_page(
        w.db, caller=_operator(w), filters=Filters(since=1.0)
    ),
    "audit events of a key": lambda w, _: log.list_page(
        w.db, caller=_operator(w), filters=Filters(actor_ids=["key-00007"])
    ),
    "audit events of a type": lambda w, _: log.list_page(
        w.db, caller=_operator(w), filters=Filters(types=["job.cancelled"])
    ),
    "verifying the audit log": lambda w, _: chain.check(w.db, peppers=PEPPER.all(), after=FAR + 9, limit=5),
    "sealing": lambda w, _: chain.seal(w.db, pepper=PEPPER.current),
    "a second sealing": lambda w, _: chain.seal(w.db, pepper=PEPPER.current),
    "usage of a project": lambda w, _: usage_report.report(
        w.db, caller=w.caller, query=usage_report.UsageQuery(start_time=w.clock.now - 9)
    ),
    "usage of all projects": lambda w, _: usage_report.report(
        w.db, caller=_operator(w), query=usage_report.UsageQuery(start_time=w.clock.now - 9, group_by=("model",))
    ),
    "a new upload": lambda w, _: add_parts(w),
    "expiring files": lambda w, _: _expire_files(w),
    "creating a key idempotently": lambda w, _: api_keys.create(
        w.db, caller=w.caller, request=api_keys.KeyRequest(name="once"), pepper=PEPPER, idempotency_key="i"
    ),
    "effects of a revocation": lambda w, _: _revoke(w),
    "hiding unused files": lambda w, _: _hide(w),
    "a page of deliveries": lambda w, ids: delivery_log.list_page(
        w.db, **owner(w), endpoint_id=ids["hook"], after=ids["delivery"]
    ),
    "a delivery and its attempts": lambda w, ids: delivery_log.tries(
        w.db, [delivery_log.get(w.db, **owner(w), delivery_id=ids["delivery"]).id]
    ),
    "a replay": lambda w, ids: delivery_log.replay(w.db, **owner(w), delivery_id=ids["delivery"]),
    "sending a due delivery": lambda w, _: send(w, status_code=503),
    "check for due deliveries": lambda w, _: delivery_queue.claim(w.db, pepper=PEPPER),
    "replays since a time": lambda w, ids: delivery_log.replay_failed(
        w.db, **owner(w), endpoint_id=ids["hook"], since=w.clock.now
    ),
    "writing a due tracker run": lambda w, _: write_tracker_runs(w),
    "check for due tracker runs": lambda w, _: tracker_runs.claim(w.db, types=["tensorboard"], limit=9),
    "a repeated submission": lambda w, _: (
        w.clock.advance(3600),
        submission.made_before(w.db, caller=w.caller, idempotency_key=None, body_digest="none", is_client_retry=True),
    ),
    "a repeated sweep": lambda w, _: creation.made_before(
        w.db, caller=w.caller, idempotency_key=None, body_digest="none", is_client_retry=True
    ),
}


def _check_key(world: World) -> None:
    with world.db.write() as session:
        caller = replace(world.caller, api_key_id="key-00007", service_jobs_per_day=50)
        quotas.check_key(session, caller, now=world.clock.now)


def _new_secret(world: World) -> str:
    return authentication.create(world.db, project_id=world.caller.project_id, name="new", pepper=PEPPER)[1]


def _expire_files(world: World) -> None:
    with world.db.write() as session:
        garbage_collection._expire_files(session, now=1.0)  # pyright: ignore[reportPrivateUsage]


def _revoke(world: World) -> None:
    """Run all parts of a revocation except the check for the last operator key, which reads all operator keys."""
    key_ids, project_ids = [world.caller.api_key_id], [world.caller.project_id]
    with world.db.read() as session:
        key = session.get_one(ApiKey, world.caller.api_key_id)
        revocation._descendants(session, key)  # pyright: ignore[reportPrivateUsage]
        revocation._unfinished(session, key_ids, project_ids)  # pyright: ignore[reportPrivateUsage]
    revocation._cancel_sweeps(world.db, ["key-none"])  # pyright: ignore[reportPrivateUsage]
    revocation._cancel_jobs(world.db, ["key-none"], project_ids)  # pyright: ignore[reportPrivateUsage]


def _operator(world: World) -> Caller:
    return replace(world.caller, is_operator=True)


def _hide(world: World) -> None:
    with world.db.write() as session:
        hide_unused(session, manifest("adapter").digest)


def test_frequent_statements_never_scan_growing_tables(world: World) -> None:
    ids = fill_with_history(world)
    whole: dict[str, dict[str, list[str]]] = {}

    for what, act in ACTS.items():
        with listening(world.db) as sent:
            act(world, ids)
        assert sent, what
        found = {statement: tables for statement, values in sent if (tables := read_whole(world.db, statement, values))}
        whole |= {what: found} if found else {}

    assert whole == {}


def test_full_scan_of_a_growing_table_is_detected(world: World) -> None:
    fill_with_history(world)

    with listening(world.db) as sent, world.db.read() as session:
        session.connection().exec_driver_sql("select id from jobs where suffix = 'none'")

    assert read_whole(world.db, *sent[-1]) == ["jobs"]


def test_attempts_of_a_trainer_are_searched_by_end_time(world: World) -> None:
    fill_with_history(world)

    with listening(world.db) as sent:
        job_logs.attempts_of(world.db, "t-00007", ended_after=world.clock.now)

    ended = next((statement, values) for statement, values in sent if "ended_at > " in statement)
    searched = [found for found in _searched(world.db, *ended) if "trainer_id" in found]
    assert ["ended_at" in found for found in searched] == [True]


def _searched(db: Database, statement: str, values: Any) -> list[str]:
    """Return the conditions of the index searches in the statement's query plan."""
    with db.engine.connect() as connection:
        if db.is_sqlite:
            return [step.detail for step in connection.exec_driver_sql(f"explain query plan {statement}", values)]
        explained = connection.exec_driver_sql(f"explain {statement}", values).scalars()
        return [line for line in explained if "Index Cond" in line]
