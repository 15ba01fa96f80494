"""Usage of projects by day and base model, and counters of the service, updated in the transactions that change them.

A transaction writes its amounts at its end, in a fixed order. Shared rows are therefore locked only briefly, and
transactions can't deadlock on them. The counters of stored bytes follow every change (`store`). Garbage collection
compares them with a recount of the rows, because a counter that missed a change would stay wrong otherwise.
"""

from __future__ import annotations

import logging
import secrets
import zlib
from collections import Counter, defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from copy import deepcopy
from datetime import UTC, datetime
from typing import Literal, get_args

from sqlalchemy import Select, func, select, union_all
from sqlalchemy.orm import Session, SessionTransaction

from catalog.db.database import Database, add_all_to, add_if_missing, add_to, at_the_end, read_clock, upsert
from catalog.states import JobState, PriorityClass
from catalog.tables.history import Checkpoint, JobOutput
from catalog.tables.jobs import Job, Plan
from catalog.tables.storage import Adapter, AdapterExport, Artifact, File, Prepared
from catalog.tables.tenancy import ServiceCounter, StoredBytes, StoredDay, UsageDay, UsageMonth

DAY_SECONDS = 86_400
SLOTS = 16
Amount = Literal[
    "device_seconds",
    "trained_tokens",
    "num_created",
    "num_succeeded",
    "num_failed",
    "num_cancelled",
    "num_plans",
    "num_completions",
    "prompt_tokens",
    "completion_tokens",
]
ENDED: dict[JobState, Amount] = {
    JobState.SUCCEEDED: "num_succeeded",
    JobState.FAILED: "num_failed",
    JobState.CANCELLED: "num_cancelled",
}
AMOUNTS: tuple[Amount, ...] = get_args(Amount)
GATHERED = ("used", "tallies")
"""Keys of a session's `info` under which a transaction collects what it writes at its end."""
_Key = tuple[str, int, str, int]
log = logging.getLogger("lorry.catalog")


class _Pending:
    """Amounts that a transaction writes at its end."""

    def __init__(self) -> None:
        self.used: defaultdict[_Key, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.stored: defaultdict[tuple[str, int], int] = defaultdict(int)


def day_of(moment: float) -> int:
    """Return the number of days since 1970, in UTC."""
    return int(moment // DAY_SECONDS)


def add(session: Session, job: Job, amount: Amount, number: float, *, now: float) -> None:
    """Add `number` to today's usage of the job's project for the job's base model."""
    if not number:
        return
    slot = zlib.crc32((job.worker_id or job.id).encode()) % SLOTS
    _pending(session).used[job.project_id, day_of(now), job.base_model, slot][amount] += number


def add_plan(session: Session, plan: Plan, *, now: float) -> None:
    """Count one more plan today that a worker has to compute for the project."""
    slot = zlib.crc32(plan.id.encode()) % SLOTS
    _pending(session).used[plan.project_id, day_of(now), plan.base_model, slot]["num_plans"] += 1


def add_completion(
    session: Session,
    *,
    project_id: str,
    base_model: str,
    request_id: str,
    prompt_tokens: int,
    completion_tokens: int,
    now: float,
) -> None:
    """Add an answered inference request to today's usage of its project for its base model."""
    slot = zlib.crc32(request_id.encode()) % SLOTS
    amounts = _pending(session).used[project_id, day_of(now), base_model, slot]
    amounts["num_completions"] += 1
    amounts["prompt_tokens"] += prompt_tokens
    amounts["completion_tokens"] += completion_tokens


def store(session: Session, project_id: str, num_bytes: int, *, now: float) -> None:
    """Add `num_bytes`, which may be negative, to the project's stored bytes. stored_bytes.py defines what counts."""
    if num_bytes:
        _pending(session).stored[project_id, day_of(now)] += num_bytes


@contextmanager
def savepoint(session: Session) -> Generator[SessionTransaction]:
    """Begin a savepoint as `begin_nested` does. Its rollback also discards the amounts that it has added."""
    kept, is_kept = {name: deepcopy(session.info[name]) for name in GATHERED if name in session.info}, False
    try:
        with session.begin_nested() as nested:
            yield nested
            is_kept = nested.is_active
    finally:
        if not is_kept:
            for name in GATHERED:
                session.info.pop(name, None)
            session.info.update(kept)


def stored_bytes(session: Session, project_id: str) -> int:
    """Return the project's stored bytes, without what this transaction adds."""
    return session.scalar(select(StoredBytes.num_bytes).where(StoredBytes.project_id == project_id)) or 0


def month_of(moment: float) -> int:
    """Return the number of months since the year 0, in UTC."""
    date = datetime.fromtimestamp(moment, UTC)
    return date.year * 12 + date.month - 1


def next_month(moment: float) -> float:
    """Return when the month after that of `moment` begins, in seconds since 1970."""
    year, month = divmod(month_of(moment) + 1, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()


def month_seconds(session: Session, project_id: str, *, now: float) -> float:
    """Return the project's device-seconds in this calendar month (UTC), without what this transaction adds."""
    of_month = (UsageMonth.project_id == project_id, UsageMonth.month == month_of(now))
    return session.scalar(select(func.sum(UsageMonth.device_seconds)).where(*of_month)) or 0.0


def total(session: Session, project_id: str, amount: Amount, *, first_day: int) -> float:
    """Return the project's usage since `first_day` began, including what this transaction adds."""
    of_project = (UsageDay.project_id == project_id, UsageDay.day >= first_day)
    written = session.scalar(select(func.sum(getattr(UsageDay, amount))).where(*of_project)) or 0
    pending: _Pending | None = session.info.get("used")
    used = pending.used.items() if pending is not None else ()
    return written + sum(added[amount] for key, added in used if key[0] == project_id and key[1] >= first_day)


def _pending(session: Session) -> _Pending:
    pending: _Pending | None = session.info.get("used")
    if pending is None:
        pending = session.info["used"] = _Pending()
        at_the_end(session, "daily", _write)
    return pending


def _write(session: Session) -> None:
    pending: _Pending = session.info.pop("used", None) or _Pending()
    session.flush()  # writes everything else first, so that the shared rows of a day are locked only briefly
    for (project_id, day, base_model, slot), amounts in sorted(pending.used.items()):
        key = {"project_id": project_id, "day": day, "base_model": base_model, "slot": slot}
        add_to(session, UsageDay, key, {name: amounts[name] for name in AMOUNTS})
    for (project_id, month, slot), device_seconds in sorted(_by_month(pending).items()):
        key = {"project_id": project_id, "month": month, "slot": slot}
        add_to(session, UsageMonth, key, {"device_seconds": device_seconds})
    for (project_id, day), num_bytes in sorted(pending.stored.items()):
        if not num_bytes:
            continue
        add_to(session, StoredBytes, {"project_id": project_id}, {"num_bytes": num_bytes})
        stored = stored_bytes(session, project_id)
        upsert(session, StoredDay, [{"project_id": project_id, "day": day, "num_bytes": stored}])


def _by_month(pending: _Pending) -> dict[tuple[str, int, int], float]:
    found: defaultdict[tuple[str, int, int], float] = defaultdict(float)
    for (project_id, day, _, slot), amounts in pending.used.items():
        if amounts["device_seconds"]:
            found[project_id, month_of(day * DAY_SECONDS), slot] += amounts["device_seconds"]
    return found


COUNTER_SLOTS = 16
CounterName = Literal["jobs", "claims", "attempts_ended", "leases_expired", "trained_tokens", "adapters"]
Counters = dict[tuple[str, str], int]
"""Values of counters by name and label."""


def count(session: Session, name: CounterName, label: str = "", number: int = 1) -> None:
    """Add `number`, which may be negative, to a counter at the end of the transaction."""
    pending: Counter[tuple[str, str]] | None = session.info.get("tallies")
    if pending is None:
        pending = session.info["tallies"] = Counter[tuple[str, str]]()
        at_the_end(session, "tallies", _write_counters)
    pending[name, label] += number


def on_transition(session: Session, job: Job, before: JobState | None, *, now: float) -> None:
    """Count the job in its new state instead of its previous one. A final state also counts as usage of the day."""
    if before is not None:
        count(session, "jobs", state_label(before, job.priority), -1)
    count(session, "jobs", state_label(job.state, job.priority))
    ended = ENDED.get(JobState(job.state))
    if ended is not None:
        add(session, job, ended, 1, now=now)


def state_label(state: str, priority: int) -> str:
    return f"{state} {priority}"


def jobs_by_state(tallies: Counters) -> dict[tuple[JobState, PriorityClass], int]:
    """Return the number of jobs for every pair of state and class, including zeros."""
    return {
        (state, priority): tallies.get(("jobs", state_label(state, priority)), 0)
        for state in JobState
        for priority in PriorityClass
    }


def read_counters(session: Session) -> Counters:
    """Return all counters, without what this transaction adds."""
    summed = select(ServiceCounter.name, ServiceCounter.label, func.sum(ServiceCounter.number)).group_by(
        ServiceCounter.name, ServiceCounter.label
    )
    return {(name, label): int(number) for name, label, number in session.execute(summed)}


def _write_counters(session: Session) -> None:
    pending: Counter[tuple[str, str]] = session.info.pop("tallies", None) or Counter()
    changed = sorted((name, label, number) for (name, label), number in pending.items() if number)
    if not changed:
        return
    session.flush()  # writes everything else first, so that the shared rows of counters are locked only briefly
    slot = secrets.randbelow(COUNTER_SLOTS)
    rows = [{"name": name, "label": label, "slot": slot, "number": number} for name, label, number in changed]
    add_all_to(session, ServiceCounter, ("name", "label", "slot"), ("number",), rows)


def recount(session: Session, project_id: str | None = None) -> dict[str, int]:
    """Return stored bytes by project, for all projects or one. A project that stores nothing may be missing.

    An object counts once for each row that refers to it, although the store keeps equal bytes only once.
    """
    parts = union_all(*_parts()).subquery()
    total = select(parts.c.project_id, func.sum(parts.c.num_bytes)).group_by(parts.c.project_id)
    if project_id is not None:
        total = total.where(parts.c.project_id == project_id)
    return {owner: int(num_bytes) for owner, num_bytes in session.execute(total)}


def reconcile(db: Database) -> int:
    """Correct the counters that differ from the recount. Returns how many were corrected."""
    with db.read() as session:
        counted = recount(session)
        kept = {row.project_id: row.num_bytes for row in session.scalars(select(StoredBytes))}
    differing = [owner for owner in sorted(counted | kept) if counted.get(owner, 0) != kept.get(owner, 0)]
    return sum(_correct(db, project_id) for project_id in differing)


def _correct(db: Database, project_id: str) -> bool:
    """Recount and correct one project. Returns whether its counter differed.

    The counter is locked first. The recount includes what other transactions committed before, and they add what they
    commit later.
    """
    with db.write() as session:
        add_if_missing(session, StoredBytes, {"project_id": project_id, "num_bytes": 0})
        counter = session.get_one(StoredBytes, project_id, with_for_update=True, populate_existing=True)
        difference = recount(session, project_id).get(project_id, 0) - counter.num_bytes
        store(session, project_id, difference, now=read_clock(session))
    if difference:
        log.warning("corrected stored bytes project=%s by=%d", project_id, difference)
    return difference != 0


def _parts() -> tuple[Select[str, int], ...]:
    """Select the stored bytes: files, adapters, token caches, checkpoints, adapters of checkpoints, trainer logs,
    exports."""
    adapters = select(Adapter.project_id, Artifact.num_bytes).join(Artifact, Artifact.digest == Adapter.artifact)
    checkpoints = select(Job.project_id, Artifact.num_bytes).select_from(Checkpoint)
    checkpoints = checkpoints.join(Job, Job.id == Checkpoint.job_id)
    return (
        select(File.project_id, File.num_bytes).where(File.deleted_at.is_(None)),
        adapters.where(Adapter.deleted_at.is_(None)),
        select(Prepared.project_id, Prepared.num_bytes).where(Prepared.artifact.is_not(None)),
        checkpoints.join(Artifact, Artifact.digest == Checkpoint.artifact),
        checkpoints.join(Artifact, Artifact.digest == Checkpoint.adapter),
        select(Job.project_id, JobOutput.num_bytes).join(JobOutput, JobOutput.job_id == Job.id),
        select(AdapterExport.project_id, AdapterExport.num_bytes),
    )
