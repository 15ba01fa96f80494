"""A database with years of history, for tests of the cost of statements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy import insert, select

from catalog.db.database import Database
from catalog.fleet import workers
from catalog.history import queries, tracker_runs
from catalog.lifecycle import recording
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.registry import permissions
from catalog.settings import Settings
from catalog.spec.sweep import SweepRequest
from catalog.states import EndReason
from catalog.storage import multipart_uploads
from catalog.storage.store import Blob
from catalog.sweeps import controller, creation
from catalog.sweeps import queries as sweep_queries
from catalog.tables.fleet import Trainer
from catalog.tables.history import Attempt, Checkpoint, JobEvent, MetricBlock, TrackerRunRow
from catalog.tables.jobs import FileOverlap, Job, JobLabel, Plan, Sweep, Trial
from catalog.tables.storage import Adapter, Artifact, File, Prepared, Upload, UploadPart
from catalog.tables.table import Table
from catalog.tables.tenancy import ApiKey, AuditEvent, ModelPermission, StoredDay, UsageDay
from catalog.tables.webhooks import WebhookDelivery, WebhookTry
from catalog.webhooks import delivery_log, delivery_queue, endpoints
from catalog.webhooks.outbox import EVENT_TYPES
from tests.catalog.plan_data import ready as ready_plan
from tests.catalog.world import PEPPER, World, manifest, sha

FAR = 10_000
"""An offset beyond the chain positions that a test reaches."""
MANY = 2000
"""Number of jobs that ended long ago: enough for PostgreSQL to choose the plans that it chooses for a million."""
Changes = Callable[[str], dict[str, Any]]
COPIED: dict[type[Table], Changes] = {
    ApiKey: lambda n: {"id": f"key-{n}", "digest": f"hmac {n}", "revoked_at": 1.0},
    Artifact: lambda n: {"digest": f"artifact {n}"},
    File: lambda n: {"id": f"file-{n}", "digest": f"bytes {n}"},
    Prepared: lambda n: {"key": f"key {n}", "file_digest": f"bytes {n}", "artifact": f"artifact {n}"},
    Job: lambda n: {
        **{"id": f"ftjob-{n}", "worker_id": f"w-{n}", "trainer_id": f"t-{n}", "sweep_id": f"sweep-{n}"},
        **{"training_file": f"file-{n}", "validation_file": f"file-{n}"},
    },
    Attempt: lambda n: {"claim_id": f"claim-{n}", "job_id": f"ftjob-{n}", "trainer_id": f"t-{n}"},
    JobEvent: lambda n: {"job_id": f"ftjob-{n}"},
    TrackerRunRow: lambda n: {"job_id": f"ftjob-{n}"},
    MetricBlock: lambda n: {"job_id": f"ftjob-{n}"},
    JobLabel: lambda n: {"job_id": f"ftjob-{n}", "label": f"label {int(n) % 40}"},
    Checkpoint: lambda n: {
        **{"id": f"ftckpt-{n}", "job_id": f"ftjob-{n}", "name": f"ft:{n}:ckpt-step-1"},
        **{"artifact": f"artifact {n}", "adapter": f"artifact {n}"},
    },
    Adapter: lambda n: {"id": f"adapter-{n}", "name": f"ft:{n}", "job_id": f"ftjob-{n}", "artifact": f"artifact {n}"},
    ModelPermission: lambda n: {"id": f"cp-{n}", "model_id": f"adapter-{n}"},
    Plan: lambda n: {"id": f"plan-{n}", "state": "ready", "claim_id": f"planning-{n}", "created_at": 1.0},
    FileOverlap: lambda n: {"train_key": f"train {n}", "valid_key": f"valid {n}"},
    Trainer: lambda n: {"id": f"trainer-{n}", "worker_id": f"w-{n}", "pack_key": f"key {n}"},
    Upload: lambda n: {"id": f"upload-{n}", "cancelled_at": 1.0, "part_bytes": 0},
    AuditEvent: lambda n: {"id": f"audit-{n}", "link": int(n) + FAR, "project_id": f"proj-{n}", "actor_id": f"key-{n}"},
    UsageDay: lambda n: {"day": int(n)},
    StoredDay: lambda n: {"day": int(n)},
    UploadPart: lambda n: {"id": f"part-{n}", "upload_id": f"upload-{n}"},
    Sweep: lambda n: {"id": f"sweep-{n}", "training_file": f"file-{n}", "validation_file": f"file-{n}"},
    Trial: lambda n: {"job_id": f"ftjob-{n}", "sweep_id": f"sweep-{n}"},
    WebhookDelivery: lambda n: {"id": f"delivery-{n}"},
    WebhookTry: lambda n: {"delivery_id": f"delivery-{n}"},
}
"""The columns that differ in the copies of one row, for each table that grows."""
GROWING = {table.__tablename__ for table in COPIED}


def fill_with_history(world: World) -> dict[str, str]:
    """Fill the database with many ended jobs, one running and four queued. Returns the ids that the tests query."""
    world.worker(integrations=("tensorboard",))
    world.worker("w2")
    _search(world)
    claim = world.running(metadata={"team": "search"}, tags=["nightly"], integrations=[{"type": "tensorboard"}])
    recording.record_metrics(world.db, claim.claim_id, [{"kind": "train", "step": 1, "loss": 2.0}])
    exported = recording.Exported(
        artifact=manifest("weights"), lineage={"outputs": {"num_parameters": 1}}, lineage_id="1" * 64
    )
    files = manifest("checkpoint", kind="checkpoint")
    recording.record_checkpoint(world.db, claim.claim_id, step=1, artifact=files, exported=exported)
    (checkpoint,) = queries.checkpoints_page(world.db, **world.of(claim.job.id)).items
    hook = endpoints.create(
        world.db, **owner(world), name="a", url="https://a/", event_types=EVENT_TYPES, pepper=PEPPER
    )[0]
    adapter = world.complete(claim.claim_id)
    write_tracker_runs(world)
    send(world, status_code=204)
    operator = replace(world.caller, is_operator=True)
    permissions.grant(world.db, caller=operator, model=adapter.name, projects_named=["theirs"])
    upload = add_parts(world)
    send(world, status_code=204)
    planned = ready_plan(world, validation_file=world.file())
    pack_key = claim.job.pack_key
    workers.register_trainer(world.db, trainer_id="t", worker_id="w1", base_digest=sha("smol"), pack_key=pack_key)
    workers.end_trainer(world.db, "t")
    _fill(world.db)
    running = world.running(integrations=[{"type": "tensorboard"}])
    sweep_id, trials = _sweep(world)
    waiting = [world.queued() for _ in range(4)]
    return {
        "ended": claim.job.id,
        "adapter": adapter.id,
        "checkpoint": checkpoint.name,
        "running": running.job.id,
        "claim": running.claim_id,
        "file": world.file_id,
        "upload": upload,
        "plan": planned.id,
        "first": waiting[0].id,
        "second": waiting[1].id,
        "sweep": sweep_id,
        "trial": trials[0].claim_id,
        "another trial": trials[1].claim_id,
        "hook": hook.id,
        "delivery": _newest_delivery(world, hook.id),
    }


def _search(world: World) -> None:
    """Add a sweep that has ended."""
    sweep_id, trials = _sweep(world)
    for claim in trials:
        claims.end(world.db, claim.claim_id, reason=EndReason.CANCELLED_BY_USER, detail="Cancelled.")
    while controller.advance(world.db):
        pass
    assert (
        sweep_queries.get(world.db, project_id=world.caller.project_id, sweep_id=sweep_id).sweep.finished_at is not None
    )


def _sweep(world: World) -> tuple[str, list[Claim]]:
    """Create a sweep of two trials that train and have reached a rung. Returns its id and the claims."""
    search = {"type": "asha", "trials": 2, "min_steps": 1}
    body = {"model": "smol", "training_file": world.file_id, "validation_file": world.file_id, "search": search}
    request = SweepRequest.model_validate({**body, "parameters": {"lora.rank": {"min": 1, "max": 8}}})
    made = creation.create(world.db, caller=world.caller, request=request, body_digest="a sweep")
    world.prepare_all(num_steps=100)
    trials = [claim for claim in world.claim() if claim.job.sweep_id == made.id]
    numbers = sweep_queries.trials_by_job(world.db, [claim.job.id for claim in trials])
    trials.sort(key=lambda claim: numbers[claim.job.id].number)
    for claim in trials:
        recording.record_metrics(world.db, claim.claim_id, [{"kind": "valid", "step": 1, "loss": 1.0}])
    return made.id, trials


def of_sweep(world: World, ids: dict[str, str]) -> dict[str, Any]:
    return {"project_id": world.caller.project_id, "sweep_id": ids["sweep"]}


def owner(world: World) -> dict[str, Any]:
    return {"project_id": world.caller.project_id}


def send(world: World, *, status_code: int) -> None:
    outcome = delivery_queue.DeliveryResult(started_at=1.0, seconds=0.1, status_code=status_code)
    while turn := delivery_queue.claim(world.db, pepper=PEPPER):
        for outgoing in turn.deliveries:
            delivery_queue.record(world.db, outgoing, outcome)
        delivery_queue.release(world.db, turn)


def write_tracker_runs(world: World) -> None:
    for run in tracker_runs.claim(world.db, types=["tensorboard"], limit=9):
        tracker_runs.record(world.db, run, tracker_runs.poll(world.db, run), run_id="run")


def _newest_delivery(world: World, hook: str) -> str:
    return delivery_log.list_page(world.db, **owner(world), endpoint_id=hook, limit=1).items[0].id


def add_parts(world: World, upload_id: str | None = None) -> str:
    """Add a part to an upload, which is created if none is named. Returns the upload's id."""
    owner, settings = world.caller.project_id, Settings()
    if upload_id is None:
        fields: dict[str, Any] = {"purpose": "user_data", "filename": "a", "lifetime_seconds": None}
        begun = multipart_uploads.create(world.db, project_id=owner, num_bytes=9, **fields, settings=settings)
        upload_id = begun.upload.id
    content = Blob(digest=sha(f"part at {world.clock.now}"), num_bytes=9)
    multipart_uploads.record_part(world.db, project_id=owner, upload_id=upload_id, content=content, settings=settings)
    return upload_id


def _fill(db: Database) -> None:
    with db.write() as session:
        connection = session.connection()
        for table, changes in COPIED.items():
            columns = [column for column in table.__table__.columns if column.name != "seq"]  # assigned by the database
            one = connection.execute(select(*columns)).mappings().first()
            assert one is not None, table
            connection.execute(insert(table), [{**one, **changes(f"{number:05}")} for number in range(MANY)])
    if not db.is_sqlite:  # a SQLite database in use has no statistics either
        with db.engine.connect() as connection:
            connection.exec_driver_sql("analyze")
            connection.commit()
