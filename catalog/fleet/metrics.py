"""Reads the metrics of the whole service. It takes the same time with ten jobs and with a million.

Totals come from counters (catalog/usage/ledger.py); other values come from indexes of unfinished jobs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.db.database import Database, read_clock
from catalog.fleet import cordons, views
from catalog.fleet.views import WorkerState, WorkerView
from catalog.states import EndReason, JobState, PriorityClass
from catalog.tables.history import JobEvent
from catalog.tables.jobs import Job
from catalog.tables.tasks import Task
from catalog.tables.webhooks import WebhookDelivery
from catalog.tasks.task_queue import TaskKind
from catalog.usage import ledger

MAX_COUNTED = 10_000
"""Upper limit of the reported number of pending deliveries."""
NAMELESS = "unnamed"
"""Name for a loaded base model whose name was deleted."""
Device = tuple[str, str]
"""Host and device: cpu, cpu:0-3 (some of its cores), cuda:0, or cuda:0+1 (a group)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """Current metrics of the whole service."""

    jobs: Mapping[tuple[JobState, PriorityClass], int]
    """Contains every pair."""
    oldest_wait_seconds: Mapping[PriorityClass, float]
    """0 if no job is queued. Held jobs are not included."""
    claims: int
    attempts_ended: Mapping[EndReason, int]
    leases: Mapping[str, int]
    """Counts jobs in training, and jobs whose files are prepared."""
    leases_overdue: int
    """Expired leases that have not been reclaimed yet."""
    leases_expired: Mapping[str, int]
    trained_tokens: int
    """Trained tokens of succeeded jobs."""
    adapters: int
    events: int
    """Number of the last event."""
    workers: Mapping[WorkerState, int]
    """Workers with a heartbeat within the last hour."""
    workers_cordoned: int
    """Cordoned workers that have not stopped."""
    trainers: Mapping[str, int]
    """Trainers by name of the loaded base model."""
    trainer_jobs: Mapping[str, int]
    """Running jobs by name of their base model."""
    tokens_per_second: Mapping[Device, float]
    """Last values that trainers reported, summed by device. The memory values are summed in the same way."""
    predicted_bytes: Mapping[Device, float]
    peak_bytes: Mapping[Device, float]
    devices: Mapping[Device, Mapping[str, float]]
    """As reported by worker/node/utilization.py. Metrics that a device does not report are omitted."""
    webhooks_pending: int
    """At most MAX_COUNTED."""
    webhooks_overdue_seconds: float


def read(db: Database) -> Numbers:
    """Read the metrics. Raises Unavailable."""
    workers = views.workers(db)
    live = [view for view in workers if view.state not in ("lost", "ended")]
    with db.read() as session:
        now, kept = read_clock(session), ledger.read_counters(session)
        pending, due_at = _webhooks(session, now=now)
        return Numbers(
            jobs=ledger.jobs_by_state(kept),
            oldest_wait_seconds=_oldest_waits(session, now=now),
            claims=kept.get(("claims", ""), 0),
            attempts_ended={reason: kept.get(("attempts_ended", reason.value), 0) for reason in EndReason},
            leases={"training": _num_leases(session), "preparing": _num_preparations(session)},
            leases_overdue=_num_leases(session, until=now),
            leases_expired={"training": kept.get(("leases_expired", "training"), 0)},
            trained_tokens=kept.get(("trained_tokens", ""), 0),
            adapters=kept.get(("adapters", ""), 0),
            events=session.scalar(select(func.max(JobEvent.seq))) or 0,
            workers=_by_state(workers),
            workers_cordoned=cordons.count(session),
            trainers=Counter(_name(view.base_names) for view in live if view.worker.resident_base),
            trainer_jobs=_jobs_of_bases(session),
            tokens_per_second=_reported_by_trainers(live, "tokens_per_second"),
            predicted_bytes=_reported_by_trainers(live, "predicted_bytes"),
            peak_bytes=_reported_by_trainers(live, "peak_bytes"),
            devices=_devices(live),
            webhooks_pending=pending,
            webhooks_overdue_seconds=0.0 if due_at is None else now - due_at,
        )


def _oldest_waits(session: Session, *, now: float) -> dict[PriorityClass, float]:
    """Return the longest wait by class. Each class reads only the first entry of an index."""
    first = {
        each: select(func.min(Job.queued_at)).where(Job.priority == int(each), Job.queued_at.is_not(None))
        for each in PriorityClass
    }
    found = session.execute(select(*(oldest.scalar_subquery() for oldest in first.values()))).one()
    return {
        each: 0.0 if queued_at is None else max(0.0, now - queued_at)
        for each, queued_at in zip(first, found, strict=True)
    }


def _num_leases(session: Session, *, until: float | None = None) -> int:
    leased = select(func.count()).select_from(Job).where(Job.state == JobState.RUNNING, Job.lease_expires_at > 0)
    return session.scalar(leased if until is None else leased.where(Job.lease_expires_at <= until)) or 0


def _num_preparations(session: Session) -> int:
    claimed = (Task.kind == TaskKind.PREPARATION, Task.claim_id.is_not(None))
    return session.scalar(select(func.count()).select_from(Task).where(*claimed)) or 0


def _jobs_of_bases(session: Session) -> Counter[str]:
    """Count running jobs by the name of the base model in their request."""
    running = select(Job.base_model, func.count()).where(Job.state == JobState.RUNNING).group_by(Job.base_model)
    return Counter({row[0]: row[1] for row in session.execute(running)})


def _webhooks(session: Session, *, now: float) -> tuple[int, float | None]:
    """Return the number of pending deliveries, and the time at which the first due one was due."""
    waiting = select(WebhookDelivery.next_try_at).where(WebhookDelivery.next_try_at.is_not(None))
    some = waiting.limit(MAX_COUNTED).subquery()
    first = select(func.min(WebhookDelivery.next_try_at)).where(WebhookDelivery.next_try_at <= now)
    return session.scalar(select(func.count()).select_from(some)) or 0, session.scalar(first)


def _by_state(workers: Iterable[WorkerView]) -> dict[WorkerState, int]:
    """Count workers by state. The result contains every state."""
    found = Counter(view.state for view in workers)
    return {state: found[state] for state in get_args(WorkerState)}


def _name(names: list[str]) -> str:
    return min(names, default=NAMELESS)


def _reported_by_trainers(live: Iterable[WorkerView], name: str) -> dict[Device, float]:
    found: defaultdict[Device, float] = defaultdict(float)
    for view in live:
        value: Any = (view.worker.report or {}).get(name)
        if view.worker.trainer_id is not None and isinstance(value, int | float):
            found[_device(view)] += value
    return dict(found)


def _devices(live: Iterable[WorkerView]) -> dict[Device, dict[str, float]]:
    found: dict[Device, dict[str, float]] = {}
    for view in live:
        device: dict[str, Any] = (view.worker.report or {}).get("device") or {}
        known = {name: float(value) for name, value in device.items() if isinstance(value, int | float)}
        found[_device(view)] = {"memory_bytes": float(view.worker.memory_bytes), **known}
    return found


def _device(view: WorkerView) -> Device:
    """Return the worker's device; a device group counts as one device."""
    devices: list[dict[str, Any]] = view.worker.devices or [{}]
    first = devices[0]
    kind, cores = str(first.get("kind", "cpu")), first.get("cores") or ()
    numbers = [f"{min(cores)}-{max(cores)}"] if cores else first.get("indices") or ()
    return view.worker.host, ":".join([kind, *(["+".join(map(str, numbers))] if numbers else [])])
