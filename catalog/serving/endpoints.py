"""Serving endpoints: register, list and remove them. Operators do this; projects see the names and states."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.audit.log import AuditType
from catalog.db.database import Database, read_clock, serialize
from catalog.errors import Conflict, InvalidRequest, NotFound
from catalog.pepper import Pepper, resealed, seal, unseal
from catalog.registry import base_models
from catalog.serving import servability
from catalog.spec.model_fields import LABEL, label_fault
from catalog.tables.serving import Deployment, ServingEndpoint
from catalog.tables.table import Json, new_id
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskKind

EngineKind = Literal["vllm"]
ENGINES: tuple[EngineKind, ...] = get_args(EngineKind)
BUILT_IN = "built-in"
"""Name of the built-in engine where an endpoint's name may stand, so no endpoint has it."""
MAX_ENDPOINTS = 100
MAX_URL, MAX_FOLDER, MAX_KEY = 2048, 1024, 512
"""Maximum lengths in characters."""
MAX_REPORT = 4096
"""Maximum length of a report why a server can't be started, in characters."""
DEFAULT_MAX_RANK = 16
"""vLLM's default of --max-lora-rank."""
PURPOSE = b"lorry: api keys of serving endpoints"
URL = re.compile(
    r"https?://(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}))(?::\d{1,5})?(?:/[\x21-\x7e]*)?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewEndpoint:
    """An endpoint as an operator describes it. api_key: None if the server requires none."""

    name: str
    base_model: str
    kind: EngineKind
    url: str
    adapter_folder: str
    max_rank: int
    api_key: str | None


def register(
    db: Database, *, project_id: str, new: NewEndpoint, pepper: Pepper, is_client_retry: bool = False
) -> ServingEndpoint:
    """Register an endpoint. Raises InvalidRequest, NotFound for the base model, and Conflict.

    is_client_retry: the client repeats a request that had no reply; an equal endpoint is then returned.
    """
    url = _checked(new)
    with db.write() as session:
        serialize(session, "serving endpoints")
        base = base_models.find(session, new.base_model, lock="share")
        if base.state != "ready" or base.digest is None:
            raise Conflict("base_not_ready", base=base.name, state=base.state, param="base_model")
        architecture = (base.description or {}).get("architecture")
        if architecture in servability.VLLM_WITHOUT_LORA:
            raise Conflict("base_model_not_servable", base=base.name, architecture=architecture, param="base_model")
        found = session.scalar(select(ServingEndpoint).where(ServingEndpoint.name == new.name))
        if found is not None:
            if is_client_retry and (found.url, found.adapter_folder) == (url, new.adapter_folder):
                return found
            raise _name_taken(found)
        if len(session.scalars(select(ServingEndpoint.id)).all()) >= MAX_ENDPOINTS:
            raise Conflict("too_many_serving_endpoints", max_endpoints=MAX_ENDPOINTS)
        now = read_clock(session)
        row = ServingEndpoint(
            id=new_id("endpoint"),
            name=new.name,
            kind=new.kind,
            project_id=project_id,
            base_model=base.name,
            base_digest=base.digest,
            url=url,
            adapter_folder=new.adapter_folder,
            max_rank=new.max_rank,
            state="pending",
            created_at=now,
        )
        if new.api_key is not None:
            row.sealed_key = seal(new.api_key, purpose=PURPOSE, row_id=row.id, pepper=pepper.current)
        session.add(row)
        task_queue.add(session, TaskKind.ENDPOINT, row.id, project_id=None, run_after=now)
        _note(session, row, "serving_endpoint.created", now=now)
        return row


def list_all(db: Database) -> list[ServingEndpoint]:
    """Return all endpoints sorted by name."""
    with db.read() as session:
        existing = select(ServingEndpoint).where(ServingEndpoint.deleted_at.is_(None))
        return list(session.scalars(existing.order_by(ServingEndpoint.name)))


def get(db: Database, name: str) -> ServingEndpoint:
    """Return the endpoint with this name or id. Raises NotFound."""
    with db.read() as session:
        return find(session, name)


def remove(db: Database, name: str, *, is_client_retry: bool = False) -> str:
    """Remove an endpoint: its adapters are unloaded, then its row is deleted. Returns its id. Raises NotFound.

    is_client_retry: the client repeats a request that had no reply, so an endpoint that is removed already is no error.
    """
    with db.write() as session:
        row = _row(session, name, lock=True)
        if row is None and is_client_retry:
            return name
        if row is None or (row.deleted_at is not None and not is_client_retry):
            raise _missing(session, name, param="endpoint")
        if row.deleted_at is None:
            now = read_clock(session)
            row.deleted_at = now
            gone = {"state": "removing", "updated_at": now}
            session.execute(update(Deployment).where(Deployment.endpoint_id == row.id).values(gone))
            _note(session, row, "serving_endpoint.deleted", now=now)
        return row.id


def report(db: Database, name: str, *, error: str | None) -> ServingEndpoint:
    """Record why the server can't be started; None: it is being started again. Raises NotFound."""
    with db.write() as session:
        row = find(session, name, lock=True)
        now = read_clock(session)
        is_failed = row.state == "failed"
        if (is_failed and row.last_error == error) or (not is_failed and error is None):
            return row  # nothing changes
        if error is not None:
            row.state, row.last_error = "failed", error
            waiting = (Deployment.endpoint_id == row.id, Deployment.state.in_(("ready", "pending")))
            found = {**deployment_state(row), "updated_at": now}
            session.execute(update(Deployment).where(*waiting).values(found))
        else:
            shown = deployment_state(row)["last_error"]  # other failed deployments wait for their next attempt
            failed = (Deployment.endpoint_id == row.id, Deployment.state == "failed", Deployment.last_error == shown)
            row.state, row.last_error = "pending", None
            again = {**deployment_state(row), "next_try_at": now, "updated_at": now}
            session.execute(update(Deployment).where(*failed).values(again))
        details: Json = {"name": row.name, "state": row.state}
        log.note(session, "serving_endpoint.reported", now=now, object_id=row.id, project_id=None, details=details)
        return row


def deployment_state(row: ServingEndpoint) -> Json:
    """Return the state of a deployment on an endpoint that is not ready, with the reason."""
    if row.state == "failed":
        shown = f"The server of endpoint {row.name!r} can't be started. Ask an operator to repair it."
        return {"state": "failed", "last_error": shown, "operator_error": row.last_error}
    shown = f"Endpoint {row.name!r} is {'not ready yet' if row.state == 'pending' else row.state}."
    reason = None if row.last_error is None else f"{shown} {row.last_error}"
    return {"state": "pending", "last_error": shown, "operator_error": reason}


def find(session: Session, name: str, *, lock: bool = False, param: str = "endpoint") -> ServingEndpoint:
    """Like `get`, within a transaction. lock: prevents changes until the transaction ends."""
    row = _row(session, name, lock=lock)
    if row is None or row.deleted_at is not None:
        raise _missing(session, name, param=param)
    return row


def api_key(row: ServingEndpoint, *, peppers: list[bytes]) -> str | None:
    """Return the server's API key, or None if it requires none. Raises Conflict if it can't be decrypted any more."""
    if row.sealed_key is None:
        return None
    key = unseal(row.sealed_key, purpose=PURPOSE, row_id=row.id, peppers=peppers)
    if key is None:
        raise Conflict("serving_key_lost", name=row.name)
    return key


def seal_all(db: Database, *, peppers: list[bytes]) -> int:
    """Encrypt with the current pepper all API keys that are encrypted with the previous one. Returns how many."""
    number = 0
    with db.write() as session:
        with_key = select(ServingEndpoint).where(ServingEndpoint.sealed_key.is_not(None)).order_by(ServingEndpoint.id)
        for row in session.scalars(with_key.with_for_update()):
            assert row.sealed_key is not None, "only rows with a key are selected"
            sealed = resealed(row.sealed_key, purpose=PURPOSE, row_id=row.id, peppers=peppers)
            if sealed not in (None, row.sealed_key):
                row.sealed_key = sealed
                number += 1
    return number


def _row(session: Session, name: str, *, lock: bool) -> ServingEndpoint | None:
    named = select(ServingEndpoint).where(or_(ServingEndpoint.id == name, ServingEndpoint.name == name))
    return session.scalar(named.with_for_update() if lock else named)


def _missing(session: Session, name: str, *, param: str) -> NotFound:
    existing = select(ServingEndpoint.name).where(ServingEndpoint.deleted_at.is_(None)).order_by(ServingEndpoint.name)
    names = list(session.scalars(existing.limit(10)))
    if names:
        return NotFound("serving_endpoint_not_found", name=name, names=", ".join(names), param=param)
    return NotFound("no_serving_endpoints", name=name, param=param)


def _name_taken(row: ServingEndpoint) -> Conflict:
    is_going = row.deleted_at is not None
    return Conflict(
        "serving_endpoint_being_removed" if is_going else "serving_endpoint_exists", name=row.name, param="name"
    )


def _checked(new: NewEndpoint) -> str:
    """Return the address without a trailing slash and /v1. Raises InvalidRequest."""
    if not LABEL.fullmatch(new.name) or new.name in (*ENGINES, BUILT_IN) or new.name.startswith("endpoint-"):
        fault = label_fault(new.name) if not LABEL.fullmatch(new.name) else "it has another meaning"
        raise InvalidRequest("invalid_serving_endpoint_name", new=new.name[:80], fault=fault, param="name")
    if not URL.fullmatch(new.url) or any(mark in new.url for mark in "?#@"):
        raise InvalidRequest("invalid_serving_url", param="url")
    return new.url.rstrip("/").removesuffix("/v1").rstrip("/")


def _note(session: Session, row: ServingEndpoint, type: AuditType, *, now: float) -> None:  # noqa: A002
    details: Json = {"name": row.name, "base_model": row.base_model, "kind": row.kind, "url": row.url}
    log.note(session, type, now=now, object_id=row.id, project_id=None, details=details)
