"""Creates two projects with objects of every kind. All names contain a mark, which the other project must never see."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Column, ColumnElement, select

from api.deps import Services
from catalog.db.database import Database
from catalog.jobs import commands
from catalog.lifecycle import recording
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.registry import permissions
from catalog.spec.integrations import INTEGRATION_TYPES
from catalog.spec.sweep import SweepRequest
from catalog.states import EndReason
from catalog.storage import files, multipart_uploads
from catalog.storage.store import Blob
from catalog.sweeps import creation
from catalog.tables.history import Checkpoint
from catalog.tables.jobs import Job, Plan, Sweep
from catalog.tables.storage import Adapter, File, Upload, UploadPart
from catalog.tables.table import Table
from catalog.tables.tenancy import ApiKey, ModelPermission
from catalog.tables.webhooks import WebhookDelivery, WebhookEndpoint
from catalog.tenancy import authentication, projects
from catalog.tenancy.authentication import Caller
from catalog.webhooks import delivery_queue, endpoints
from catalog.webhooks.delivery_queue import DeliveryResult
from catalog.webhooks.outbox import EVENT_TYPES
from tests.api.trained import BASE, stored_weights, trained
from tests.catalog import plan_data
from tests.catalog.world import PEPPER, Clock, World, manifest

MARKS = ("kestrel", "osprey")
"""A mark for each project, which is part of its name and of all names in it."""
ID = re.compile(r"(?:[a-z]+-)+[0-9a-f]{24}")


def organization_of(mark: str) -> str:
    return f"{mark}-people"


def reader_of(mark: str) -> str:
    """Return the name of the project that may read an adapter."""
    return f"{mark}-reader"


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A client's API key."""

    mark: str
    name: str
    project_id: str
    id: str
    secret: str
    is_operator: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """A key of each project, and an operator key of the first project."""

    keys: tuple[Key, Key]
    operator: Key


class MarkedWorld(World):
    """A world with projects that are named by their marks, and files whose content can be downloaded."""

    def __init__(self, services: Services, *, hooks: str) -> None:
        """hooks: the URL to which webhooks are sent."""
        self.services, self.mark, self.hooks = services, MARKS[0], hooks
        super().__init__(services.db, Clock())
        self.worker(integrations=INTEGRATION_TYPES)

    def new_caller(self, project: str) -> Caller:
        """Create a project in its own organization, whose name contains the mark, too."""
        mark = {"ours": MARKS[0], "theirs": MARKS[1]}[project]
        return self.caller_of(organization_of(mark), mark)

    def file(
        self,
        *,
        caller: Caller | None = None,
        purpose: str = "fine-tune",
        num_rows: int | None = 12,
        kind: str | None = None,
    ) -> str:
        assert kind is None, "rows are chats"
        said = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": f"A {self.mark}."}]
        content = (json.dumps({"messages": said}) + "\n").encode() * (num_rows or 1)
        spooled = self.services.settings.data_dir / "spooled"
        spooled.write_bytes(content)
        made = files.create(
            self.db,
            self.services.store,
            project_id=(caller or self.caller).project_id,
            purpose=purpose,
            filename=f"{self.mark}.jsonl",
            spooled=spooled,
            num_bytes=len(content),
            digest=hashlib.sha256(content).hexdigest(),
            settings=self.services.settings,
        )
        return made.id

    def running(self, **fields: Any) -> Claim:
        """Return the claim of a new job, which may be claimed together with others."""
        job = self.queued(**fields)
        return next(claim for claim in self.claim() if claim.job.id == job.id)

    def turn_over(self) -> None:
        """Switch to the other project, for which objects are created from now on."""
        self.caller, self.stranger = self.stranger, self.caller
        self.mark = MARKS[1]
        self.file_id = self.file()


def plant(services: Services, folder: Path, *, hooks: str) -> Planted:
    """Create both projects, each with objects of every kind and jobs in every state. hooks: the URL to which webhooks
    are sent."""
    world = MarkedWorld(services, hooks=hooks)
    operator = _key(world, is_operator=True)
    _fill(world, folder / world.mark)
    first = _key(world)
    world.turn_over()
    _fill(world, folder / world.mark)
    return Planted(keys=(first, _key(world)), operator=operator)


def _key(world: MarkedWorld, *, is_operator: bool = False) -> Key:
    name = f"{world.mark}-operator" if is_operator else world.mark
    project_id = world.caller.project_id
    row, secret = authentication.create(
        world.db, project_id=project_id, name=name, pepper=PEPPER, is_operator=is_operator
    )
    return Key(mark=world.mark, name=name, project_id=project_id, id=row.id, secret=secret, is_operator=is_operator)


def _search(world: MarkedWorld, job: dict[str, Any]) -> None:
    """Create a sweep of 100 trials, of which two exist."""
    search = {"search": {"type": "random", "trials": 100, "seed": 0}, "objective": {"metric": "train_loss"}}
    varied = {"parameters": {"lora.rank": {"min": 1, "max": 64}}, "max_concurrent": 2}
    request = SweepRequest.model_validate({**job, **search, **varied})
    creation.create(world.db, caller=world.caller, request=request, body_digest=world.mark)


def _fill(world: MarkedWorld, folder: Path) -> None:
    mark, db = world.mark, world.db
    named = {"model": BASE, "metadata": {"team": mark}, "tags": [mark]}
    folder.mkdir()
    _webhooks(world)
    adapters = [trained(world.services, world, folder / str(number), suffix=mark) for number in range(3)]
    world.worker(integrations=INTEGRATION_TYPES)
    failed = world.running(suffix=f"{mark}-failed", **named)
    claims.end(db, failed.claim_id, reason=EndReason.USER_ERROR, detail=f"{mark} can't be read")
    cancelled = world.queued(suffix=f"{mark}-cancelled", **named)
    commands.cancel(db, **world.of(cancelled.id))
    running = world.running(suffix=f"{mark}-running", integrations=[{"type": "mlflow"}], **named)
    exported = stored_weights(world.services, folder / "exported")
    files = manifest(mark, kind="checkpoint")
    recording.record_checkpoint(db, running.claim_id, step=5, artifact=files, exported=exported)
    recording.record_metrics(db, running.claim_id, [{"kind": "train", "step": 5, "loss": 1.0}])
    recording.record_event(db, running.claim_id, level="info", message=f"{mark} keeps training")
    paused = world.queued(suffix=f"{mark}-paused", **named)
    commands.pause(db, **world.of(paused.id))
    for number in range(3):
        world.submit(suffix=f"{mark}-{number}", **named)
        world.file(num_rows=10 + number)
    for _ in range(6):
        _search(world, {"suffix": f"{mark}-trial", "training_file": world.file_id, **named})
        authentication.create(db, project_id=world.caller.project_id, name=mark, pepper=PEPPER)
        _upload(world)
    _sweep(world)
    plan_data.ready(world, suffix=mark, **named)
    plan_data.plan(world, suffix=mark, training_file=world.file(num_rows=9), **named)
    _share(world, adapters[0])
    while turn := delivery_queue.claim(db, pepper=PEPPER):
        for outgoing in turn.deliveries:
            outcome = DeliveryResult(started_at=1.0, seconds=0.1, status_code=503, reply=outgoing.url)
            delivery_queue.record(db, outgoing, outcome)
        delivery_queue.release(db, turn)


def _webhooks(world: MarkedWorld) -> None:
    """Create an endpoint that gets all events, and a disabled one."""
    project_id = world.caller.project_id
    for is_enabled in (True, False):
        row, _ = endpoints.create(
            world.db,
            project_id=project_id,
            name=world.mark,
            url=f"{world.hooks}/{world.mark}",
            event_types=EVENT_TYPES,
            pepper=PEPPER,
        )
        changes = endpoints.EndpointChange(enabled=is_enabled)
        endpoints.change(world.db, project_id=project_id, endpoint_id=row.id, changes=changes, pepper=PEPPER)


def _share(world: MarkedWorld, adapter: Adapter) -> None:
    """Share an adapter with a second project of the organization, which the other project must not see, either."""
    reader = projects.create(world.db, reader_of(world.mark), organization=organization_of(world.mark)).id
    operator = replace(world.caller, is_operator=True)
    permissions.grant(world.db, caller=operator, model=adapter.name, projects_named=[reader])


def _sweep(world: MarkedWorld) -> None:
    fields = {
        "model": BASE,
        "training_file": world.file_id,
        "suffix": world.mark,
        "objective": {"metric": "train_loss"},
    }
    search = {"search": {"type": "grid"}, "parameters": {"lora.rank": {"values": [4, 8]}}}
    asked = SweepRequest.model_validate({**fields, **search})
    creation.create(world.db, caller=world.caller, request=asked, body_digest=world.mark)


def _upload(world: MarkedWorld) -> None:
    """Create an open upload with one part."""
    settings, project_id = world.services.settings, world.caller.project_id
    content = Blob(digest=hashlib.sha256(world.mark.encode()).hexdigest(), num_bytes=len(world.mark))
    view = multipart_uploads.create(
        world.db,
        project_id=project_id,
        purpose="user_data",
        filename=world.mark,
        num_bytes=len(world.mark),
        lifetime_seconds=None,
        settings=settings,
    )
    world.services.store.put_bytes(world.mark.encode())
    multipart_uploads.record_part(
        world.db, project_id=project_id, upload_id=view.upload.id, content=content, settings=settings
    )


def names_by_parameter(db: Database, project_id: str) -> dict[str, list[str]]:
    """Return the names of the project's current objects, by the path parameter or body field that takes them."""
    ours = {
        parameter: (table.id, table.project_id == project_id)
        for parameter, table in (
            ("file_id", File),
            ("job_id", Job),
            ("upload_id", Upload),
            ("sweep_id", Sweep),
            ("plan_id", Plan),
            ("api_key_id", ApiKey),
            ("webhook_endpoint_id", WebhookEndpoint),
        )
    }
    with db.read() as session:

        def found(column: Any, *conditions: ColumnElement[bool]) -> list[str]:
            return [*session.scalars(select(column).where(*conditions))]

        names = {parameter: found(*asked) for parameter, asked in ours.items()}
        there = Adapter.project_id == project_id, Adapter.deleted_at.is_(None)
        adapters, adapter_ids = found(Adapter.name, *there), found(Adapter.id, *there)
        checkpoints = found(Checkpoint.name, Checkpoint.job_id.in_(names["job_id"]), Checkpoint.name.is_not(None))
        hooks = WebhookDelivery.endpoint_id.in_(names["webhook_endpoint_id"])
        return names | {
            "model": adapters + checkpoints,
            "fine_tuned_model": adapters + checkpoints,
            "adapter": adapter_ids + adapters + checkpoints,
            "part_ids": found(UploadPart.id, UploadPart.upload_id.in_(names["upload_id"])),
            "permission_id": found(ModelPermission.id, ModelPermission.model_id.in_(adapter_ids)),
            "webhook_delivery_id": found(WebhookDelivery.id, hooks),
        }


def ids_of(db: Database, project_id: str) -> set[str]:
    """Return all ids in rows that belong to the project, directly or through other rows, in all tables."""
    with db.read() as session:
        rows = [
            {value for value in row if isinstance(value, str) and ID.fullmatch(value)}
            for table in Table.metadata.sorted_tables
            if (named := [column for column in table.columns if _names_something(column)])
            for row in session.execute(select(*named))
        ]
    owned, grown = set[str](), {project_id}
    while grown != owned:
        owned = grown
        grown = owned.union(*(row for row in rows if not row.isdisjoint(owned)))
    return owned


def _names_something(column: Column[Any]) -> bool:
    return column.name == "id" or column.name.endswith("_id") or bool(column.foreign_keys)


def data_file(db: Database, project_id: str) -> str:
    """Return the id of a file that can be trained on."""
    ours = select(File.id).where(File.project_id == project_id, File.purpose == "fine-tune", File.num_rows >= 9)
    with db.read() as session:
        return session.scalars(ours.where(File.deleted_at.is_(None)).order_by(File.created_at)).first() or ""


def first_adapter(db: Database, project_id: str) -> list[str]:
    """Return the id and name of the project's first adapter."""
    ours = select(Adapter).where(Adapter.project_id == project_id).order_by(Adapter.created_at)
    with db.read() as session:
        found = session.scalars(ours).first()
        return [] if found is None else [found.id, found.name]


def models_by_permission(db: Database, project_id: str) -> dict[str, str]:
    given = select(ModelPermission.id, Adapter.name).join(Adapter, Adapter.id == ModelPermission.model_id)
    with db.read() as session:
        return {row.id: row.name for row in session.execute(given.where(Adapter.project_id == project_id))}


def parts_by_upload(db: Database, project_id: str) -> dict[str, list[str]]:
    parts = select(UploadPart.upload_id, UploadPart.id).join(Upload, Upload.id == UploadPart.upload_id)
    with db.read() as session:
        found = [*session.execute(parts.where(Upload.project_id == project_id))]
    return {upload_id: [part for of, part in found if of == upload_id] for upload_id, _ in found}
