"""Privileges of each database role, as data. PostgreSQL enforces them if the roles exist.

The owner of the tables applies them after each migration (migrations/env.py). A stolen worker password can then neither
create keys nor rewrite the audit log. Deployments with a single role, and SQLite, have no such boundary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, text

from catalog.tables.table import Table

API_ROLE: Final = "lorry_api"
WORKER_ROLE: Final = "lorry_worker"

SEQUENCES: Final = """
    select seq.oid::regclass::text from pg_class seq
    join pg_depend dep on dep.objid = seq.oid and dep.classid = 'pg_class'::regclass and dep.deptype in ('a', 'i')
    join pg_class tab on tab.oid = dep.refobjid and dep.refclassid = 'pg_class'::regclass
    where seq.relkind = 'S' and tab.relnamespace = 'public'::regnamespace and tab.relname = any(:tables)
    order by 1
"""
"""Selects the sequences that number the rows of Lorry's tables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rights:
    """Privileges of a role on a table: column names, or True for every column, including those of later versions."""

    select: bool | tuple[str, ...] = False
    insert: bool | tuple[str, ...] = False
    update: bool | tuple[str, ...] = False
    delete: bool = False


NONE = Rights()
READ = Rights(select=True)
APPEND = Rights(select=True, insert=True)
KEEP = Rights(select=True, insert=True, update=True)
EVERYTHING = Rights(select=True, insert=True, update=True, delete=True)

AUDIT_CONTENT: Final = (
    "id",
    "type",
    "effective_at",
    "project_id",
    "object_id",
    "actor_type",
    "actor_id",
    "actor_name",
    "request_id",
    "address",
    "details",
)
"""Columns of an audit event that its writer sets. The sequence sets `seq`, and sealing adds the rest later."""
LEASE: Final = ("claim_id", "lease_expires_at")
"""Columns of every `Leased` table."""

WORKER_RIGHTS: Mapping[str, Rights] = {
    # Without the columns of the request: adapter, format, repository, project.
    "adapter_exports": Rights(
        select=True,
        update=(
            "status",
            "started_at",
            "finished_at",
            "error",
            "refused_since",
            "artifact",
            "num_bytes",
            "verification",
            "cost",
            "hub_url",
        ),
    ),
    "adapters": APPEND,
    "api_keys": NONE,
    "artifacts": EVERYTHING,  # a worker deletes the rows of checkpoints that newer ones replace
    "attempts": KEEP,
    "audit_events": Rights(insert=AUDIT_CONTENT),
    "audit_head": NONE,
    "base_models": Rights(select=True, update=("state", "digest", "manifest", "description", "error")),
    "batch_lines": NONE,
    "batches": READ,  # an unfinished batch keeps its file, which a worker may only read while it exists
    "checkpoints": KEEP,
    "deployments": NONE,
    "events": APPEND,
    "file_overlaps": KEEP,
    "files": APPEND,
    "gang_seats": EVERYTHING,
    "gangs": EVERYTHING,
    "idempotency_keys": NONE,
    "job_labels": NONE,
    "job_outputs": KEEP,
    # Without the columns of the request and its owner: project, submitter, spec, priority, deadline, holds.
    "jobs": Rights(
        select=True,
        update=(
            "adapter_name",
            "adapter_parameters",
            "attempt",
            "cancel_requested",
            "charged_at",
            "claimed_at",
            "counted_attempts",
            "device_seconds",
            "shardable_bytes",
            "error",
            "finished_at",
            "gathered_bytes",
            "lease_extended",
            "least_bytes",
            "least_divided_bytes",
            "longest_example",
            "lost_attempts",
            "needed_start",
            "num_preemptions",
            "num_steps",
            "own_bytes",
            "pause_requested",
            "place",
            "preempted_for",
            "progress",
            "queued_at",
            "reason",
            "reproduction",
            "result_file",
            "resumed_at",
            "preemption_requested_at",
            "run_after",
            "saved_bytes",
            "slice_bytes",
            "started_at",
            "state",
            "trained_tokens",
            "trainer_bytes",
            "trainer_id",
            "worker_id",
            *LEASE,
        ),
    ),
    "metric_blocks": EVERYTHING,
    "model_permissions": NONE,
    "organizations": READ,
    "plans": Rights(select=True, update=("state", "found", "error")),
    "prepared": EVERYTHING,
    "project_usage": KEEP,
    "projects": READ,
    "pulse": KEEP,
    "retired_keys": NONE,
    "service": READ,
    "serving_endpoints": NONE,
    "sign_ins": NONE,
    "stored_bytes": KEEP,
    "stored_days": KEEP,
    # A worker marks a sweep as due; the API server decides what follows and writes it.
    "sweeps": Rights(select=True, update=("due_at",)),
    "tallies": KEEP,
    "task_turns": KEEP,
    "tasks": EVERYTHING,
    "tracker_runs": Rights(
        select=True,
        update=("run_id", "train_step", "valid_step", "error", "finished_at"),
    ),
    "trainers": KEEP,
    "trials": Rights(select=True, update=("score", "step", "recent", "reached_step", "reached_score", "stopped")),
    "upload_parts": NONE,
    "uploads": NONE,
    "usage_days": KEEP,
    "usage_months": KEEP,
    "wanted_bases": Rights(select=True, update=("error", "failed_at")),
    "webhook_deliveries": Rights(insert=True),
    # Which endpoints receive an event, but neither their URLs nor their secrets.
    "webhook_endpoints": Rights(select=("id", "project_id", "event_types", "disabled_at", "deleted_at")),
    "webhook_tries": NONE,
    "workers": KEEP,
}
"""Privileges of workers. A test checks that every table has an entry."""

API_RESTRICTED: Mapping[str, Rights] = {
    # Append and seal only: no role of a running service can change or delete past events.
    "audit_events": Rights(select=True, insert=AUDIT_CONTENT, update=("link", "previous", "digest")),
    "audit_head": KEEP,
    "service": READ,
}
"""Tables on which the API servers do not have every privilege."""


def rights(role: str) -> Mapping[str, Rights]:
    """Return the privileges of `role`, by table name."""
    if role == WORKER_ROLE:
        return WORKER_RIGHTS
    return {table.name: API_RESTRICTED.get(table.name, EVERYTHING) for table in Table.metadata.sorted_tables}


def apply(connection: Connection) -> None:
    """Grant the existing roles exactly the privileges of this version, and revoke all others.

    The caller is the owner of the tables, within the transaction of the migration. The function is idempotent.
    """
    if connection.dialect.name != "postgresql":
        return
    named = {"roles": [API_ROLE, WORKER_ROLE]}
    sequences = connection.scalars(text(SEQUENCES), {"tables": list(Table.metadata.tables)}).all()
    for role in connection.scalars(text("select rolname from pg_roles where rolname = any(:roles)"), named).all():
        for statement in _statements(role, ", ".join(sequences)):
            connection.exec_driver_sql(statement)


def _statements(role: str, sequences: str) -> Iterator[str]:
    """Each statement names Lorry's tables, because their owner may not change other tables in the schema."""
    tables = ", ".join([*Table.metadata.tables, "alembic_version"])
    yield f"revoke all on {tables} from {role}"
    yield f"revoke all on sequence {sequences} from {role}"
    yield f"grant usage on schema public to {role}"
    yield f"grant select on alembic_version to {role}"
    for table, given in rights(role).items():
        for verb in ("select", "insert", "update"):
            columns: bool | tuple[str, ...] = getattr(given, verb)
            if columns:
                of = "" if columns is True else f" ({', '.join(columns)})"
                yield f"grant {verb}{of} on {table} to {role}"
        if given.delete:
            yield f"grant delete on {table} to {role}"
    yield f"grant usage on sequence {sequences} to {role}"
