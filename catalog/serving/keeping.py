"""The work of the API process that holds an endpoint's lease: what should be loaded there, and what was found.

Each write names the claim, so a process that has lost the lease writes nothing. A transaction locks the endpoint first,
then its deployments. No transaction is open while the server is called.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

from sqlalchemy import ColumnElement, delete, or_, select, update
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.errors import StaleClaim
from catalog.serving import endpoints
from catalog.storage.manifest import Manifest
from catalog.tables.serving import Deployment, ServingEndpoint
from catalog.tables.storage import Adapter, Artifact
from catalog.tables.table import Json
from catalog.tables.tasks import Task
from catalog.tables.tenancy import Organization
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskClaim

ENDPOINT_LEASE_SECONDS = 60.0
WAITS_SECONDS = (5.0, 15.0, 60.0, 300.0)
"""Waits after the first failed attempt to load an adapter, the second, …; the last one repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WantedAdapter:
    """A deployment. manifest: None if its adapter was deleted, so that it has to be unloaded."""

    deployment_id: str
    adapter_id: str
    name: str
    project_id: str
    manifest: Manifest | None
    state: str
    reference: Json | None
    is_due: bool
    """Another attempt to load it is due."""

    @property
    def is_wanted(self) -> bool:
        return self.state != "removing" and self.manifest is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointWork:
    """An endpoint with its deployments, as of now."""

    endpoint: ServingEndpoint
    adapters: tuple[WantedAdapter, ...]
    endpoint_ids: frozenset[str]
    """All endpoints of this service, this one too."""
    service_id: str
    """24 hex digits that no other service has: those of the oldest organization, which is never deleted."""

    @property
    def is_removed(self) -> bool:
        return self.endpoint.deleted_at is not None


def read(db: Database, claim: TaskClaim) -> EndpointWork | None:
    """Return the endpoint with its deployments, oldest first, or None if the claim is stale."""
    with db.read() as session:
        now = read_clock(session)
        held = select(Task.subject).where(Task.claim_id == claim.claim_id)
        row = session.scalar(select(ServingEndpoint).where(ServingEndpoint.id.in_(held)))
        if row is None:
            return None
        joined = (
            select(Deployment, Adapter, Artifact)
            .join(Adapter, Adapter.id == Deployment.adapter_id)
            .outerjoin(Artifact, Artifact.digest == Adapter.artifact)
            .where(Deployment.endpoint_id == row.id)
        )
        wanted: list[WantedAdapter] = []
        for one, adapter, found in session.execute(joined.order_by(Deployment.created_at, Deployment.id)):
            artifact = cast("Artifact | None", found)  # an outer join
            manifest = None
            if adapter.deleted_at is None and artifact is not None:
                manifest = Manifest.from_rows(artifact.kind, artifact.files)
            wanted.append(
                WantedAdapter(
                    deployment_id=one.id,
                    adapter_id=adapter.id,
                    name=adapter.name,
                    project_id=one.project_id,
                    manifest=manifest,
                    state=one.state,
                    reference=one.reference,
                    is_due=one.next_try_at <= now,
                )
            )
        existing = frozenset(session.scalars(select(ServingEndpoint.id)))
        oldest = select(Organization.id).order_by(Organization.created_at, Organization.id).limit(1)
        service_id = session.scalars(oldest).one().rpartition("-")[2]
        return EndpointWork(endpoint=row, adapters=tuple(wanted), endpoint_ids=existing, service_id=service_id)


def store_reference(db: Database, claim: TaskClaim, *, deployment_id: str | None, reference: Json) -> None:
    """Store the built-in engine's answer to the probe. deployment_id: None: that of the base model."""
    with db.write() as session:
        row = _held(session, claim)
        target = row if row is None or deployment_id is None else session.get(Deployment, deployment_id)
        if row is not None and target is not None:
            target.reference = reference


def note_reachable(
    db: Database, claim: TaskClaim, *, served_model: str, served_root: str | None, verification: Json | None = None
) -> None:
    """Record that the server answers as expected. verification: None: that of an earlier check still applies."""
    with db.write() as session:
        row = _held(session, claim)
        if row is None:
            return
        row.state, row.last_error, row.checked_at = "ready", None, read_clock(session)
        row.served_model, row.served_root = served_model, served_root
        row.verification = verification or row.verification


def note_unusable(
    db: Database,
    claim: TaskClaim,
    *,
    state: str,
    error: str,
    verification: Json | None = None,
    is_silent: bool = False,
) -> None:
    """Record why requests can't be sent to the server. Its adapters are loaded and verified again afterwards.

    state: pending, unreachable or rejected. An endpoint whose server can't be started stays failed until it answers.
    """
    with db.write() as session:
        row = _held(session, claim)
        if row is None or (row.state == "failed" and is_silent):
            return
        now = read_clock(session)
        found = {"state": state, "last_error": error, "checked_at": now}
        found |= {"verification": verification} if verification is not None else {}
        session.execute(update(ServingEndpoint).where(ServingEndpoint.id == row.id).values(found))
        session.refresh(row)
        usable = (Deployment.endpoint_id == row.id, Deployment.state.in_(("ready", "pending")))
        waiting = {**endpoints.deployment_state(row), "next_try_at": now, "updated_at": now}
        session.execute(update(Deployment).where(*usable).values(waiting))


def note_missing(db: Database, claim: TaskClaim, deployment_ids: Collection[str]) -> None:
    """Record that adapters which were ready are not loaded any more, because the server was restarted."""
    with db.write() as session:
        row = _held(session, claim)
        if row is not None and deployment_ids:
            now = read_clock(session)
            lost = {"state": "pending", "next_try_at": now, "num_failures": 0, "updated_at": now}
            ready = (Deployment.id.in_(deployment_ids), Deployment.state == "ready")
            session.execute(update(Deployment).where(*ready).values(lost))


def note_loaded(db: Database, claim: TaskClaim, deployment_id: str, *, verification: Json) -> bool:
    """Record that an adapter is loaded and verified, so that its requests go to the endpoint. Returns False if it must
    be unloaded instead, because it was undeployed meanwhile."""
    with db.write() as session:
        one = _deployment(session, claim, deployment_id)
        if one is None or one.state == "removing":
            return False
        one.state, one.last_error, one.operator_error = "ready", None, None
        one.verification, one.num_failures = verification, 0
        one.updated_at = read_clock(session)
        return True


def note_failed(
    db: Database,
    claim: TaskClaim,
    deployment_id: str,
    *,
    state: str,
    error: str,
    operator_error: str | None = None,
    verification: Json | None = None,
) -> None:
    """Record why an adapter is not loaded, and when it is tried again. A report that the server can't start is kept.

    state: pending if that may succeed without a change, else failed. error: shown to the project, so it contains no
    text of the server. operator_error: shown to operators in its place.
    """
    with db.write() as session:
        row = _held(session, claim)
        one = _deployment(session, claim, deployment_id)
        if row is None or row.state == "failed" or one is None or one.state == "removing":
            return
        now = read_clock(session)
        wait = WAITS_SECONDS[min(one.num_failures, len(WAITS_SECONDS) - 1)]
        found: Json = {"state": state, "last_error": error, "operator_error": operator_error, "updated_at": now}
        found["verification"] = verification
        found |= {"num_failures": one.num_failures + 1, "next_try_at": now + wait}
        session.execute(update(Deployment).where(Deployment.id == one.id).values(found))


def forget(db: Database, claim: TaskClaim, deployment_ids: Sequence[str]) -> None:
    """Delete deployments whose adapters are not loaded and whose files are removed."""
    with db.write() as session:
        if _held(session, claim) is not None and deployment_ids:
            gone = (Deployment.id.in_(deployment_ids), _is_unwanted())
            session.execute(delete(Deployment).where(*gone))


def forget_endpoint(db: Database, claim: TaskClaim) -> None:
    """Delete a removed endpoint with its deployments."""
    with db.write() as session:
        row = _held(session, claim)
        if row is not None and row.deleted_at is not None:
            session.execute(delete(Deployment).where(Deployment.endpoint_id == row.id))
            session.delete(row)
            task_queue.finish(session, claim)


def _is_unwanted() -> ColumnElement[bool]:
    deleted = select(Adapter.id).where(Adapter.id == Deployment.adapter_id, Adapter.deleted_at.is_not(None))
    return or_(Deployment.state == "removing", deleted.exists())


def _held(session: Session, claim: TaskClaim) -> ServingEndpoint | None:
    """Return the endpoint, locked; None if the claim is stale."""
    try:
        return task_queue.hold(session, claim, ServingEndpoint)
    except StaleClaim:
        return None


def _deployment(session: Session, claim: TaskClaim, deployment_id: str) -> Deployment | None:
    if _held(session, claim) is None:
        return None
    return session.scalar(select(Deployment).where(Deployment.id == deployment_id).with_for_update())
