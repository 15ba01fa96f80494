"""Finds the models that live workers and serving endpoints can answer with now."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from sqlalchemy import Select, select

from catalog.db.database import Database, read_clock
from catalog.fleet import views
from catalog.resources.pack_key import pack_key
from catalog.serving import routes
from catalog.tables.fleet import GangSeat
from catalog.tables.history import Checkpoint
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, BaseModelRow

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
