"""The audit log: actor and object of each requested change, written in the same transaction as the change.

Sealing is in `chain`, and downloads are in `downloads`. Changes that the service makes to a job, such as transitions,
are in the job's own events; the audit log holds changes that a client or operator requested.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, cast

from sqlalchemy import ColumnElement, Table, insert, select
from sqlalchemy.orm import Session

from catalog.caller import Caller
from catalog.db.database import Database
from catalog.db.pagination import Page, paginate
from catalog.tables.table import Json, new_id
from catalog.tables.tenancy import AuditEvent

AuditType = Literal[
    "api_key.created",
    "api_key.rotated",
    "api_key.revoked",
    "api_key.updated",
    "sign_in_link.created",
    "login.succeeded",
    "logout.succeeded",
    "organization.created",
    "organization.updated",
    "project.created",
    "project.updated",
    "project.archived",
    "project.restored",
    "model.added",
    "model.deleted",
    "file.created",
    "file.deleted",
    "file.downloaded",
    "upload.created",
    "upload.cancelled",
    "job.created",
    "job.cancelled",
    "job.paused",
    "job.resumed",
    "sweep.created",
    "sweep.cancelled",
    "sweep.closed",
    "trial.stopped",
    "job.held",
    "job.released",
    "job.moved",
    "batch.created",
    "batch.cancelled",
    "adapter.deleted",
    "adapter.downloaded",
    "adapter.deployed",
    "adapter.undeployed",
    "serving_endpoint.created",
    "serving_endpoint.deleted",
    "serving_endpoint.reported",
    "adapter_export.created",
    "adapter_export.cancelled",
    "adapter_export.deleted",
    "webhook_endpoint.created",
    "webhook_endpoint.updated",
    "webhook_endpoint.secret_rotated",
    "webhook_endpoint.deleted",
    "webhook_endpoint.disabled",
    "webhook_endpoint.tested",
    "webhook_endpoint.replayed",
    "webhook_delivery.replayed",
    "permission.created",
    "permission.deleted",
    "audit.exported",
    "worker.cordoned",
    "worker.uncordoned",
    "worker.drained",
    "service.restored",
]
ActorType = Literal["api_key", "browser", "server"]
"""server: the change did not come through the API, for example from a command on the machine itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Actor:
    """The API key that made a change, by its id and label."""

    type: ActorType
    id: str | None = None
    name: str | None = None


SERVER = Actor(type="server")


@dataclass(kw_only=True, slots=True)
class Origin:
    """Origin of a change. `actor` is set once the request is authenticated."""

    request_id: str | None = None
    address: str | None = None
    actor: Actor = SERVER


@dataclass(frozen=True, kw_only=True, slots=True)
class Filters:
    """Filters for events: any of the listed values for each non-empty field, within the time limits."""

    types: Sequence[str] = ()
    actor_ids: Sequence[str] = ()
    project_ids: Sequence[str] = ()
    after: float | None = None
    """Exclusive lower limit. `since` is inclusive, `before` an exclusive upper limit, `until` an inclusive one."""
    since: float | None = None
    before: float | None = None
    until: float | None = None


_current_origin: ContextVar[Origin | None] = ContextVar("origin_of_changes", default=None)


@contextmanager
def attributed_to(origin: Origin) -> Generator[Origin]:
    """Attribute changes in this block, and in threads that copy its context, to this origin."""
    token = _current_origin.set(origin)
    try:
        yield origin
    finally:
        _current_origin.reset(token)


def actor_is(actor: Actor) -> None:
    """Set the actor of the current origin, after the request's key has been authenticated."""
    origin = _current_origin.get()
    if origin is not None:
        origin.actor = actor


def actor_id() -> str | None:
    """Return the id of the API key behind the current request, if any."""
    origin = _current_origin.get()
    return origin.actor.id if origin is not None else None


def client_address() -> str | None:
    """Return the network address of the client that sent the current request, if any."""
    origin = _current_origin.get()
    return origin.address if origin is not None else None


def note(
    session: Session,
    type: AuditType,  # noqa: A002  (the API's field name)
    *,
    now: float,
    object_id: str | None,
    project_id: str | None,
    details: Json | None = None,
    actor: Actor | None = None,
) -> None:
    """Append one event. `details` must not contain secrets or data of unbounded size.

    actor: the actor, if it differs from the origin's.
    """
    origin = _current_origin.get() or Origin()
    actor = actor or origin.actor
    # The ORM would name every column and read `seq` back, but database roles may only insert these columns.
    event = insert(cast("Table", AuditEvent.__table__)).values(
        id=new_id("audit"),
        type=type,
        effective_at=now,
        project_id=project_id,
        object_id=object_id,
        actor_type=actor.type,
        actor_id=actor.id,
        actor_name=actor.name,
        request_id=origin.request_id,
        address=origin.address,
        details=details or {},
    )
    session.execute(event.inline())


def list_page(
    db: Database, *, caller: Caller, filters: Filters, after: str | None = None, limit: int = 20
) -> Page[AuditEvent]:
    """Return a page of events, newest first: those of the caller's project, or all for operators."""
    scope = select(AuditEvent)
    if not caller.is_operator:
        scope = scope.where(AuditEvent.project_id == caller.project_id)
    with db.read() as session:
        return paginate(
            session,
            scope,
            created=AuditEvent.effective_at,
            ident=AuditEvent.id,
            after=after,
            limit=limit,
            visible=_conditions(filters),
        )


def _conditions(filters: Filters) -> tuple[ColumnElement[bool], ...]:
    at = AuditEvent.effective_at
    named: tuple[tuple[ColumnElement[bool], Collection[str]], ...] = (
        (AuditEvent.type.in_(filters.types), filters.types),
        (AuditEvent.actor_id.in_(filters.actor_ids), filters.actor_ids),
        (AuditEvent.project_id.in_(filters.project_ids), filters.project_ids),
    )
    found: list[ColumnElement[bool]] = [condition for condition, names in named if names]
    if filters.after is not None:
        found.append(at > filters.after)
    if filters.since is not None:
        found.append(at >= filters.since)
    if filters.before is not None:
        found.append(at < filters.before)
    if filters.until is not None:
        found.append(at <= filters.until)
    return tuple(found)
