"""Inference requests: the model that answers one, whether it can be answered now, and its tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.errors import Conflict, InvalidRequest, LorryError
from catalog.fleet import views
from catalog.registry import adapters, base_models
from catalog.resources.pack_key import pack_key
from catalog.serving import routes
from catalog.tables.fleet import GangSeat
from catalog.tables.history import Checkpoint
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, BaseModelRow
from catalog.usage import ledger, quotas

InferenceState = Literal["loaded", "loadable", "unavailable"]
"""`loaded`: a worker has the base model loaded or a serving endpoint has the model loaded, and answers at once.
`loadable`: a worker must load the base model first. `unavailable`: the base model is not ready, was deleted or
replaced, or no worker can load it for requests and no serving endpoint is ready for the model."""


def plain_keys(base_digest: str) -> list[str]:
    """Return the pack keys of trainers that can answer with an unquantized base model."""
    return [pack_key(base_digest, precision) for precision in ("float32", "bfloat16")]


def inference_states(db: Database, names: Collection[str]) -> dict[str, InferenceState]:
    """Return the state of each base model, adapter and checkpoint with one of these names. The caller has checked that
    the project may read them."""
    with db.read() as session:
        residents = views.residents(session, now=read_clock(session))
        accepting = [each for each in residents if not each.takes_nothing_new]
        in_gangs = set(session.scalars(select(GangSeat.worker_id)))  # they load base models for jobs alone
        is_ready = select(BaseModelRow.name, BaseModelRow.digest).where(BaseModelRow.state == "ready")
        ready = dict(session.execute(is_ready).all())
        models = [(name, name, ready[name], plain_keys(ready[name] or "")) for name in names if name in ready]
        served = routes.served(session, names)
        for trained in (_adapters(names), _checkpoints(names)):
            models += [(name, base, digest, [key]) for name, base, digest, key in session.execute(trained)]
    loaded = {each.pack_key for each in accepting}
    can_load = any(each.worker_id not in in_gangs for each in accepting)
    found: dict[str, InferenceState] = dict.fromkeys(names, "unavailable")
    for name, base_model, base_digest, keys in models:
        if base_digest is None or ready.get(base_model) != base_digest:
            continue
        if served.has(name, base_digest) or not loaded.isdisjoint(keys):
            found[name] = "loaded"
        elif can_load:
            found[name] = "loadable"
    return found


def _adapters(names: Collection[str]) -> Select[str, str, str, str]:
    columns = select(Adapter.name, Adapter.base_model, Adapter.base_digest, Job.pack_key)
    return columns.join(Job, Job.id == Adapter.job_id).where(Adapter.name.in_(names))


def _checkpoints(names: Collection[str]) -> Select[str, str, str, str]:
    columns = select(Checkpoint.name, Job.base_model, Job.base_digest, Job.pack_key)
    return columns.join(Job, Job.id == Checkpoint.job_id).where(Checkpoint.name.in_(names))


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
            raise InvalidRequest("template_without_tools", element="tools", param="tools")


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
        raise Conflict("base_changed", name=name, base_model=adapter.base_model, param="model")
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
        raise Conflict("base_import_failed" if is_failed else "base_import_unfinished", name=name, param="model")
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


def check_quota(db: Database, *, project_id: str) -> None:
    """Raise QuotaExceeded if the project has used its tokens of today."""
    with db.read() as session:
        quotas.check_tokens(session, project_id, now=read_clock(session))


def count(
    db: Database, *, project_id: str, model: Model, response_id: str, prompt_tokens: int, completion_tokens: int
) -> None:
    """Count the tokens of an answer. 0: no engine has begun it."""
    if not prompt_tokens:
        return
    with db.write() as session:
        counts: dict[str, Any] = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        answered = {"project_id": project_id, "base_model": model.base_model, "request_id": response_id}
        ledger.add_completion(session, **answered, **counts, now=read_clock(session))
