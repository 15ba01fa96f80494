"""Deployments: a project's adapter on a serving endpoint. Requests are recorded here; the API process that holds the
endpoint's lease carries them out (catalog/serving/keeping.py)."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.db.database import Database, read_clock, serialize
from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.registry import adapters, checkpoints
from catalog.serving import endpoints, servability
from catalog.spec.job import JobSpec
from catalog.tables.jobs import Job
from catalog.tables.serving import Deployment, ServingEndpoint
from catalog.tables.storage import Adapter, BaseModelRow
from catalog.tables.table import new_id

MAX_DEPLOYMENTS = 1000
"""Maximum number of a project's deployments on one endpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentView:
    """A deployment with the names of its endpoint and adapter."""

    deployment: Deployment
    endpoint: str
    adapter: str


def deploy(db: Database, *, project_id: str, adapter: str, endpoint: str) -> DeploymentView:
    """Deploy an adapter of the project. A repeated request is no error: it retries a failed deployment at once.

    Raises NotFound, InvalidRequest for a checkpoint, and Conflict if the endpoint can't serve the adapter.
    """
    with db.write() as session:
        found = _own(session, project_id, adapter)
        target = endpoints.find(session, endpoint, lock=True)
        serialize(session, f"deployments of {found.id}")
        job = session.get_one(Job, found.job_id)
        if found.base_digest != target.base_digest:
            raise Conflict(
                "other_base_model",
                name=found.name,
                base_model=found.base_model,
                base_digest=found.base_digest[:12],
                target=target.name,
                served_model=target.base_model,
                served_digest=target.base_digest[:12],
                param="endpoint",
            )
        _check_servable(session, job, found, target)
        now = read_clock(session)
        row = _row(session, target.id, found.id)
        if row is None:
            _check_number(session, project_id, target)
            row = Deployment(
                id=new_id("deployment"),
                endpoint_id=target.id,
                adapter_id=found.id,
                project_id=project_id,
                state="pending",
                num_failures=0,
                next_try_at=now,
                created_at=now,
                updated_at=now,
            )
            session.add(row)
            _note(session, row, found, target, "adapter.deployed", now=now)
        elif row.state != "ready":
            row.last_error = row.operator_error = None
            row.state, row.num_failures, row.next_try_at, row.updated_at = "pending", 0, now, now
            _note(session, row, found, target, "adapter.deployed", now=now)
        if target.state != "ready":
            for name, value in endpoints.deployment_state(target).items():
                setattr(row, name, value)
        return DeploymentView(deployment=row, endpoint=target.name, adapter=found.name)


def _check_number(session: Session, project_id: str, endpoint: ServingEndpoint) -> None:
    """Raise Conflict if the project has as many deployments on the endpoint as it may have."""
    own = (Deployment.endpoint_id == endpoint.id, Deployment.project_id == project_id)
    if (session.scalar(select(func.count()).select_from(Deployment).where(*own)) or 0) >= MAX_DEPLOYMENTS:
        raise Conflict(
            "too_many_deployments", max_deployments=MAX_DEPLOYMENTS, endpoint=endpoint.name, param="endpoint"
        )


def undeploy(db: Database, *, project_id: str, adapter: str, endpoint: str, is_client_retry: bool = False) -> str:
    """Request that an adapter is unloaded. Requests are answered by the built-in engine from now on. Returns its id.

    is_client_retry: the client repeats a request that had no reply, so a missing deployment is no error. Raises
    NotFound.
    """
    with db.write() as session:
        try:
            found = _own(session, project_id, adapter)
            target = endpoints.find(session, endpoint, lock=True)
        except NotFound:
            if is_client_retry:
                return ""
            raise
        row = _row(session, target.id, found.id)
        if row is None or row.state == "removing":
            if is_client_retry:
                return "" if row is None else row.id
            raise NotFound("deployment_not_found", name=found.name, target=target.name, id=found.id, param="endpoint")
        row.state = "removing"
        row.updated_at = now = read_clock(session)
        _note(session, row, found, target, "adapter.undeployed", now=now)
        return row.id


def of_adapter(db: Database, *, project_id: str, adapter: str) -> list[DeploymentView]:
    """Return the deployments of an adapter that the project may read, by the endpoint's name. Raises NotFound."""
    with db.read() as session:
        found = adapters.find(session, project_id, adapter)
        rows = select(Deployment, ServingEndpoint.name).join(ServingEndpoint).where(Deployment.adapter_id == found.id)
        return [
            DeploymentView(deployment=row, endpoint=name, adapter=found.name)
            for row, name in session.execute(rows.order_by(ServingEndpoint.name))
        ]


def on_endpoint(db: Database, endpoint_id: str) -> list[DeploymentView]:
    """Return all deployments on an endpoint, of every project, oldest first."""
    with db.read() as session:
        rows = (
            select(Deployment, ServingEndpoint.name, Adapter.name)
            .join(ServingEndpoint, ServingEndpoint.id == Deployment.endpoint_id)
            .join(Adapter, Adapter.id == Deployment.adapter_id)
            .where(Deployment.endpoint_id == endpoint_id)
        )
        return [
            DeploymentView(deployment=row, endpoint=endpoint, adapter=adapter)
            for row, endpoint, adapter in session.execute(rows.order_by(Deployment.created_at, Deployment.id))
        ]


def _own(session: Session, project_id: str, name: str) -> Adapter:
    if checkpoints.is_named(name):
        raise InvalidRequest("checkpoint_not_deployable", name=name, param="adapter")
    found = adapters.find(session, project_id, name, param="adapter")
    if found.project_id != project_id:
        raise Conflict("shared_adapter", name=found.name, param="adapter")
    return found


def _check_servable(session: Session, job: Job, adapter: Adapter, target: ServingEndpoint) -> None:
    base = session.get_one(BaseModelRow, target.base_model)
    architecture = (base.description or {}).get("architecture")
    spec = JobSpec.model_validate(job.spec)
    reason = servability.why_not_vllm(spec, architecture=architecture, max_rank=target.max_rank)
    if reason is not None:
        raise Conflict("not_servable", endpoint=target.name, adapter=adapter.name, reason=reason, param="endpoint")


def _row(session: Session, endpoint_id: str, adapter_id: str) -> Deployment | None:
    own = (Deployment.endpoint_id == endpoint_id, Deployment.adapter_id == adapter_id)
    return session.scalar(select(Deployment).where(*own).with_for_update())


def _note(
    session: Session,
    row: Deployment,
    adapter: Adapter,
    endpoint: ServingEndpoint,
    type: AuditType,  # noqa: A002
    *,
    now: float,
) -> None:
    details = {"name": adapter.name, "endpoint": endpoint.name}
    log.note(session, type, now=now, object_id=row.adapter_id, project_id=row.project_id, details=details)
