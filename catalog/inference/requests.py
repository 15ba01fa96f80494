"""An API process's operations on inference requests: submit one, verify who answers it, and delete it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from catalog.datasets import chat_templates
from catalog.db import lease
from catalog.db.database import Database, read_clock
from catalog.errors import Conflict, InvalidRequest, LorryError, RateLimited
from catalog.fleet import views
from catalog.inference.availability import plain_keys
from catalog.inference.claims import extended
from catalog.registry import adapters, base_models
from catalog.resources.pack_key import pack_key
from catalog.tables.fleet import Worker
from catalog.tables.inference import MAX_CLAIMS, MAX_SECONDS, InferenceRequest
from catalog.tables.jobs import Job
from catalog.tables.storage import BaseModelRow
from catalog.tables.table import Json, new_id
from catalog.usage import ledger, quotas

RESTART_SECONDS = 120.0
"""Requests are accepted for this time after the last worker was seen."""
MAX_OPEN = 1000
"""Maximum number of open requests of a project."""


START = "Ask an operator to start a worker, for example with `lorry worker`. Then retry."
FEWER = "Send fewer requests at once, or ask an operator to start another worker. Then retry."


class NoWorker(LorryError):
    """No worker answers now. The same request can be answered later."""

    status = 503
    type = "server_error"


class AnswerFailed(LorryError):
    """A worker can't answer the request, and fails again if it is repeated unchanged."""

    status = 503
    type = "server_error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The model that answers a request: a base model, and an adapter on it or None."""

    name: str
    base_model: str
    base_digest: str
    pack_key: str
    adapter: str | None
    renders_tools: bool
    """False: the chat template of the base model does not read `tools`."""

    def check_tools(self) -> None:
        """Raise InvalidRequest if no request with tools can be answered."""
        if not self.renders_tools:
            code, message, remedy = chat_templates.no_tools("tools")
            raise InvalidRequest(message, code=code, remedy=remedy, param="tools")


def resolve(db: Database, *, project_id: str, name: str) -> Model:
    """Return the model with this name: a base model, or an adapter or checkpoint that the project may read.

    Raises NotFound, NoLongerKept, and Conflict for a base model that is not ready or has changed.
    """
    with db.read() as session:
        if name.startswith("ft:"):
            return _adapter(session, project_id, name)
        return _base(session, name)


def _adapter(session: Session, project_id: str, name: str) -> Model:
    adapter = adapters.find(session, project_id, name, param="model")
    job = session.get_one(Job, adapter.job_id)
    base = session.get(BaseModelRow, adapter.base_model)
    if base is None or base.state == "deleted" or base.digest != adapter.base_digest:
        raise Conflict(
            f"Model {name!r} can't answer, because its base model {adapter.base_model!r} was deleted or replaced.",
            code="base_changed",
            remedy="Ask an operator to add the same base model again under this name: `lorry models add "
            f"{adapter.base_model} SOURCE`.",
            param="model",
        )
    return Model(
        name=adapter.name,
        base_model=adapter.base_model,
        base_digest=adapter.base_digest,
        pack_key=job.pack_key,
        adapter=adapter.artifact,
        renders_tools=_renders_tools(base),
    )


def _base(session: Session, name: str) -> Model:
    base = base_models.find(session, name)
    if base.state != "ready" or base.digest is None:
        is_failed = base.state == "failed"
        raise Conflict(
            f"Base model {name!r} can't answer yet: its import {'failed' if is_failed else 'has not finished'}.",
            code="base_not_ready",
            remedy=f"See the error with `lorry models show {name}`, and add the model again."
            if is_failed
            else f"Wait until `lorry models show {name}` shows the state 'ready'.",
            param="model",
        )
    now = read_clock(session)
    plain = plain_keys(base.digest)
    residents = views.residents(session, now=now)
    loaded = (each.pack_key for each in residents if each.pack_key in plain and not each.takes_nothing_new)
    key = next(loaded, None) or pack_key(base.digest, views.fleet_defaults(session, now=now).precision)
    return Model(
        name=base.name,
        base_model=base.name,
        base_digest=base.digest,
        pack_key=key,
        adapter=None,
        renders_tools=_renders_tools(base),
    )


def _renders_tools(base: BaseModelRow) -> bool:
    """Return what its import found. A worker decides about the requests of base models that were imported earlier."""
    return (base.description or {}).get("renders_tools", True)


def submit(
    db: Database, *, project_id: str, model: Model, body: Json, reply_to: str, max_open: int = MAX_OPEN
) -> InferenceRequest:
    """Create a request. Raises NoWorker if no worker is running, RateLimited if the project has too many, and
    QuotaExceeded."""
    with db.write() as session:
        now = read_clock(session)
        if not _has_worker(session, now=now):
            raise NoWorker(
                "No worker is running, so the request can't be answered.",
                code="no_worker",
                remedy=START,
            )
        own = (InferenceRequest.project_id == project_id, InferenceRequest.batch_id.is_(None))
        if (session.scalar(select(func.count()).where(*own)) or 0) >= max_open:
            raise RateLimited(
                f"The project has reached its limit of {max_open} open inference requests.",
                code="too_many_inference_requests",
                remedy="Wait until some of them are answered.",
                retry_after_seconds=1,
                headers={},
            )
        quotas.check_tokens(session, project_id, now=now)
        request = new_request(project_id, model, body, reply_to, now=now, expires_at=now + MAX_SECONDS)
        session.add(request)
        return request


def new_request(
    project_id: str, model: Model, body: Json, reply_to: str, *, now: float, expires_at: float
) -> InferenceRequest:
    """Return the row of a request, which is not stored yet."""
    return InferenceRequest(
        id=new_id("infer"),
        project_id=project_id,
        created_at=now,
        expires_at=expires_at,
        base_model=model.base_model,
        base_digest=model.base_digest,
        pack_key=model.pack_key,
        adapter=model.adapter,
        body=body,
        reply_to=reply_to,
    )


def _has_worker(session: Session, *, now: float) -> bool:
    """Return whether a worker is live, or was a short time ago and may be restarting."""
    recent = select(Worker.id).where(Worker.heartbeat_at > now - RESTART_SECONDS).limit(1)
    return session.scalar(recent) is not None


def is_held(db: Database, request_id: str, claim_id: str) -> bool:
    """Return whether the claim holds the request, so that its holder may answer it."""
    with db.read() as session:
        claimed = select(InferenceRequest.id).where(
            InferenceRequest.id == request_id, InferenceRequest.claim_id == claim_id
        )
        return session.scalar(claimed) is not None


def existing(db: Database, request_ids: Sequence[str]) -> set[str]:
    """Return those of the requests that have a row."""
    with db.read() as session:
        return set(session.scalars(select(InferenceRequest.id).where(InferenceRequest.id.in_(request_ids))))


def release(db: Database, request_id: str, claim_id: str) -> bool:
    """Release a request whose worker has disconnected, so that another one can answer it. Returns False if too many
    workers have failed to answer it."""
    with db.write() as session:
        row = lease.held(session, InferenceRequest, claim_id)
        if row is None or row.id != request_id:
            return True
        lease.release(row)
        row.expires_at = extended(now=read_clock(session))
        return row.num_claims < MAX_CLAIMS


def finish(db: Database, request_id: str, *, prompt_tokens: int, completion_tokens: int) -> None:
    """Delete a request, and count its tokens. Both are 0 if no worker has begun to answer it."""
    with db.write() as session:
        finish_in(session, request_id, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)


def finish_in(session: Session, request_id: str, *, prompt_tokens: int, completion_tokens: int) -> None:
    """Do what `finish` does in the caller's transaction."""
    row = session.get(InferenceRequest, request_id, with_for_update=True)
    if row is None:
        return
    if prompt_tokens:
        counts: dict[str, Any] = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        answered = {"project_id": row.project_id, "base_model": row.base_model, "request_id": row.id}
        ledger.add_completion(session, **answered, **counts, now=read_clock(session))
    session.delete(row)


def check_quota(db: Database, *, project_id: str) -> None:
    """Raise QuotaExceeded if the project has used its tokens of today."""
    with db.read() as session:
        quotas.check_tokens(session, project_id, now=read_clock(session))


def count(
    db: Database, *, project_id: str, model: Model, response_id: str, prompt_tokens: int, completion_tokens: int
) -> None:
    """Count the tokens of a request that a serving endpoint has answered. 0: it has not begun to answer."""
    if not prompt_tokens:
        return
    with db.write() as session:
        counts: dict[str, Any] = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        answered = {"project_id": project_id, "base_model": model.base_model, "request_id": response_id}
        ledger.add_completion(session, **answered, **counts, now=read_clock(session))


def remove_expired(db: Database) -> int:
    """Delete the requests that their API process did not delete, for example because it was killed. Returns their
    number."""
    with db.write() as session:
        now = read_clock(session)
        is_over = or_(InferenceRequest.expires_at <= now, InferenceRequest.num_claims >= MAX_CLAIMS)
        over = (is_over, lease.is_free(InferenceRequest, now=now))
        found = list(session.scalars(select(InferenceRequest.id).where(*over).limit(1000)))
        # The conditions are repeated because a worker may have renewed or released a request meanwhile.
        gone = delete(InferenceRequest).where(InferenceRequest.id.in_(found), *over)
        return len(session.scalars(gone.returning(InferenceRequest.id)).all()) if found else 0


def why_unanswered(db: Database, request_id: str) -> NoWorker:
    """Return the error for a request that no worker has begun to answer in time, by the state of the workers."""
    with db.read() as session:
        now = read_clock(session)
        row = session.get(InferenceRequest, request_id)
        residents = views.residents(session, now=now)
        base = "its base model" if row is None else repr(row.base_model)
        is_claimed = row is not None and (row.lease_expires_at or 0.0) > now
        is_loaded = row is not None and any(each.pack_key == row.pack_key for each in residents)
    if is_claimed and is_loaded:
        return _timeout(
            "The request was not answered in time: its worker is busy with other requests and jobs.", remedy=FEWER
        )
    if is_claimed:
        return _timeout(
            f"The request was not answered in time: a worker is still loading {base}.", remedy="Retry in a few minutes."
        )
    if not residents:
        return _timeout("The request was not answered in time: no worker is running.", remedy=START)
    if all(each.takes_nothing_new for each in residents):
        return _timeout(
            "The request was not answered in time: all workers are cordoned or draining.",
            remedy="Ask an operator to uncordon a worker or to start another one. Then retry.",
        )
    if is_loaded:
        return _timeout(
            f"The request was not answered in time: the workers that have {base} loaded are busy with other requests.",
            remedy=FEWER,
        )
    return _timeout(
        f"The request was not answered in time: no worker has {base} loaded, and none was free to load it.",
        remedy="See with `lorry workers list` what the workers do. Wait until their jobs end, or ask an operator to "
        "start another worker. Then retry.",
    )


def _timeout(message: str, *, remedy: str) -> NoWorker:
    return NoWorker(message, code="inference_timeout", remedy=remedy)
