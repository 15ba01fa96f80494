"""What waits and in which order: for claims to choose from, for people to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, and_, func, or_, select
from sqlalchemy.orm import Session

from catalog import fair_share, fleet, memory, packing
from catalog.db import Database, read_clock
from catalog.fair_share import Candidate, Turn
from catalog.methods import compares_with_start
from catalog.spec import PriorityClass
from catalog.states import MAX_COUNTED_ATTEMPTS, UNFINISHED_STATES, JobState
from catalog.tables import BaseModelRow, Job, Json, Project

MAX_CANDIDATES = 5000
"""Jobs looked at in one decision; the rest wait until these have gone."""
SHOWN = (
    "state",
    "base_model",
    "priority",
    "run_after",
    "attempt",
    "worker_id",
    "trainer_id",
    "progress",
    "suffix",
)
"""Columns of a job that an entry of the queue shows as they are."""


def turns(session: Session, *, now: float, limit: int = MAX_CANDIDATES) -> list[Turn]:
    """The jobs that may be claimed now, first turn first."""
    is_due = or_(Job.run_after.is_(None), Job.run_after <= now)
    rows = session.execute(
        select(
            Job.id,
            Job.project_id,
            Job.base_model,
            Job.base_digest,
            Job.pack_key,
            Job.priority,
            Job.created_at,
            Job.adapter_parameters,
            Job.spec["lora"]["dropout"].as_float().label("dropout"),
            Job.spec["keep"].as_string().label("keep"),
            Job.spec["lora"]["init_lora_weights"].as_string().label("start"),
            Job.spec["lora"].label("lora"),
            Job.spec["optimizer"]["type"].as_string().label("optimizer"),
            Job.spec["method"].as_string().label("method"),
            Job.parent_adapter,
            Job.longest_example,
            Job.spec["lora"]["use_dora"].as_boolean().label("use_dora"),
            Job.spec["batch_size"].as_integer().label("batch_size"),
            Job.spec["samples"].label("samples"),
            Job.counted_attempts,
        )
        .where(Job.state == JobState.QUEUED, is_due)
        .order_by(Job.priority, Job.created_at)
        .limit(limit)
    ).all()
    if not rows:
        return []
    described = _descriptions(session, {row.base_model for row in rows})
    kinds = {(row.base_model, row.pack_key) for row in rows}
    needs = {kind: _needs(described[kind[0]], kind[1]) for kind in kinds}
    candidates = [_candidate(row, described[row.base_model], needs[row.base_model, row.pack_key]) for row in rows]
    return fair_share.order(candidates, now, running_by_project=_running(session))


def _candidate(row: Row[*tuple[Any, ...]], description: Json, needs: tuple[int, int]) -> Candidate:
    """description: its base's. needs: bytes of a trainer of its kind, and of a slice."""
    trainer_bytes, slice_bytes = needs
    own_bytes = _own_bytes(row, description)
    return Candidate(
        job_id=row.id,
        project_id=row.project_id,
        base_digest=row.base_digest,
        pack_key=row.pack_key,
        priority=row.priority,
        created_at=row.created_at,
        own_bytes=own_bytes,
        saved_bytes=own_bytes - _own_bytes(row, description, recomputes=True),
        trainer_bytes=trainer_bytes,
        slice_bytes=slice_bytes,
        is_suspect=row.counted_attempts >= MAX_COUNTED_ATTEMPTS - 1,
    )


def _own_bytes(row: Row[*tuple[Any, ...]], description: Json, *, recomputes: bool = False) -> int:
    return memory.own_bytes(
        description,
        packing.precision_of(row.pack_key),
        num_parameters=row.adapter_parameters,
        dropout=row.dropout,
        keeps_best=row.keep == "best",
        use_dora=bool(row.use_dora),
        init_lora_weights=row.start,
        batch_size=row.batch_size,
        keeps_parent=row.parent_adapter is not None and compares_with_start(row.method or "supervised"),
        longest_example=row.longest_example,
        samples=row.samples,
        optimizer=row.optimizer or "adamw",
        lowest_rank=memory.lowest_rank(row.lora),
        recomputes=recomputes,
    )


def snapshot(db: Database, *, project_id: str | None) -> Json:
    """The queue as people see it: counts, the waiting in order, the running. `project_id` None: every project's.

    Positions are those in the whole queue, so a project sees how many stand before it, not who.
    """
    with db.read() as session:
        now = read_clock(session)
        places = {turn.candidate.job_id: turn for turn in turns(session, now=now)}
        entries = [_entry(row, places.get(row.id), now=now) for row in _unfinished(session, project_id)]
        entries.sort(key=lambda entry: (entry["position"] is None, entry["position"] or 0))
        return {
            "as_of": now,
            "counts": dict(Counter(entry["state"] for entry in entries)),
            "waiting_in_all": len(places),
            "jobs": entries,
            "workers": fleet.count_live(session, now=now),
        }


def has_work(db: Database) -> bool:
    """Whether there is anything to import, to prepare or to train now: whether ringing has a use."""
    with db.read() as session:
        now = read_clock(session)
        is_due = or_(Job.run_after.is_(None), Job.run_after <= now)
        untouched = and_(Job.state.in_((JobState.QUEUED, JobState.VALIDATING_FILES)), Job.claim_id.is_(None))
        is_free = or_(BaseModelRow.importing_until.is_(None), BaseModelRow.importing_until <= now)
        jobs = select(Job.id).where(untouched, is_due).limit(1)
        imports = select(BaseModelRow.name).where(BaseModelRow.state == "importing", is_free).limit(1)
        return session.scalar(jobs) is not None or session.scalar(imports) is not None


def _unfinished(session: Session, project_id: str | None) -> Sequence[Row[*tuple[Any, ...]]]:
    columns = [getattr(Job, name) for name in ("id", "created_at", *SHOWN)]
    rows = select(*columns, Project.name.label("project")).join(Project, Project.id == Job.project_id)
    rows = rows.where(Job.state.in_(UNFINISHED_STATES))
    if project_id is not None:
        rows = rows.where(Job.project_id == project_id)
    return session.execute(rows.order_by(Job.created_at, Job.id).limit(MAX_CANDIDATES)).all()


def _entry(row: Row[*tuple[Any, ...]], turn: Turn | None, *, now: float) -> Json:
    shown = {name: getattr(row, name) for name in SHOWN}
    return {
        **shown,
        "job_id": row.id,
        "project": row.project,
        "priority": PriorityClass(row.priority).name,
        "created_at": row.created_at,
        "waited_seconds": max(0.0, now - row.created_at),
        "position": turn.position if turn else None,
        "reason": turn.reason if turn else None,
    }


def _running(session: Session) -> dict[str, int]:
    counted = select(Job.project_id, func.count()).where(Job.state == JobState.RUNNING).group_by(Job.project_id)
    return {row[0]: row[1] for row in session.execute(counted)}


def _descriptions(session: Session, names: set[str]) -> dict[str, Json]:
    rows = session.scalars(select(BaseModelRow).where(BaseModelRow.name.in_(names)))
    return {row.name: row.description or {} for row in rows}


def _needs(description: Json, pack_key: str) -> tuple[int, int]:
    """Bytes of (a trainer with its first slice, a further slice)."""
    precision, quantisation = packing.precision_of(pack_key), packing.quantisation_of(pack_key)
    return memory.trainer_bytes(description, precision, quantisation), memory.slice_bytes(description, precision)
