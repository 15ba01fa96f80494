"""What a project may use at most, and a key may submit in a day: an operator says so, and None is without limit. The
highest priority of both, too.

Refused at submission: too many jobs that wait, too many in a day, the month's device-hours used up. Held in the queue:
the jobs of a project that trains as many as it may, or has used up its month. Refused at upload, and where a worker
would have to prepare files: too many bytes. Refused at creation: too many plans in a day.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.caller import Caller
from catalog.db.database import Database, get_once, read_clock, serialize
from catalog.errors import Forbidden, QuotaExceeded, RateLimited
from catalog.states import JobState, Priority, PriorityClass
from catalog.tables.jobs import Job
from catalog.tables.plans import Plan
from catalog.tables.sweeps import Sweep
from catalog.tables.table import Json
from catalog.tables.tenancy import ApiKey, Project
from catalog.tenancy import projects
from catalog.usage import ledger
from catalog.usage.ledger import DAY_SECONDS

Limit = Literal[
    "concurrent_jobs", "queued_jobs", "jobs_per_day", "device_hours_per_month", "stored_bytes", "plans_per_day"
]
COLUMNS: dict[Limit, str] = {
    "concurrent_jobs": "max_concurrent_jobs",
    "queued_jobs": "max_queued_jobs",
    "jobs_per_day": "max_jobs_per_day",
    "device_hours_per_month": "max_device_hours_per_month",
    "stored_bytes": "max_stored_bytes",
    "plans_per_day": "max_plans_per_day",
}
SAID: dict[Limit, str] = {
    "concurrent_jobs": "{limit:,.0f} jobs that train at once",
    "queued_jobs": "{limit:,.0f} jobs that wait",
    "jobs_per_day": "{limit:,.0f} jobs a day",
    "device_hours_per_month": "{limit:,.4g} device-hours a month",
    "stored_bytes": "{limit:,.0f} stored bytes",
    "plans_per_day": "{limit:,.0f} plans a day",
}
REMEDIES: dict[Limit, str] = {
    "concurrent_jobs": "Wait until one of them has ended.",
    "queued_jobs": "Wait until some of them train, or cancel some.",
    "jobs_per_day": "Submit it after that time.",
    "device_hours_per_month": "Submit it after that time.",
    "stored_bytes": "Delete files or adapters that you don't need.",
    "plans_per_day": "Create the plan after that time.",
}
WAITING = (JobState.VALIDATING_FILES, JobState.QUEUED)
CAN_HOLD = or_(Project.max_concurrent_jobs.is_not(None), Project.max_device_hours_per_month.is_not(None))
"""In a query: the project has a limit that can hold its jobs in the queue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuotaStatus:
    """A limit of a project, and how much of it is used."""

    name: Limit
    limit: float | None
    used: float
    resets_at: float | None
    """When `used` begins anew; None where it goes down by itself or never."""

    @property
    def is_reached(self) -> bool:
        return self.limit is not None and self.used >= self.limit

    def said(self) -> str:
        return SAID[self.name].format(limit=self.limit or 0)


def standings(db: Database, *, caller: Caller, project: str) -> tuple[Project, list[QuotaStatus]]:
    """All that can be limited of a project, by id or name. Raises NotFound."""
    with db.read() as session:
        row = projects.find(session, caller=caller, project=project)
        now = read_clock(session)
        return row, [standing_of(session, row, name, now=now) for name in COLUMNS]


def limit(
    db: Database,
    *,
    caller: Caller,
    project: str,
    limits: Mapping[Limit, float | None],
    highest_priority: Priority | None = None,
) -> Project:
    """Change those limits that are given; None: without limit. highest_priority: None: as it was. What is there already
    stays, and jobs keep their class. Raises NotFound."""
    with db.write() as session:
        row = projects.find(session, caller=caller, project=project)
        for name, value in limits.items():
            setattr(row, COLUMNS[name], value)
        told: Json = {"limits": dict(limits)}
        if highest_priority is not None:
            row.highest_priority = PriorityClass[highest_priority]
            told["limits"]["highest_priority"] = highest_priority
        log.note(session, "project.updated", now=read_clock(session), object_id=row.id, project_id=row.id, details=told)
        return row


def check_submission(session: Session, caller: Caller, *, now: float, is_promised: bool = False) -> None:
    """One more job, in the transaction that accepts it: nobody else of the project is counted meanwhile.

    is_promised: as of check_key. Raises QuotaExceeded, and RateLimited for the key's own jobs a day.
    """
    check_key(session, caller, now=now, is_promised=is_promised)
    project = project_of(session, caller.project_id)
    names: list[Limit] = ["queued_jobs", "jobs_per_day", "device_hours_per_month"]
    limited: list[Limit] = [name for name in names if getattr(project, COLUMNS[name]) is not None]
    if limited:
        serialize(session, f"quota {project.id}")
    for name in limited:
        standing = standing_of(session, project, name, now=now)
        if standing.is_reached:
            raise exceeded(project, standing, now=now)


def check_plan(session: Session, caller: Caller, *, is_computed: bool, now: float) -> None:
    """One more plan, in the transaction that creates it. No other transaction of the project creates a plan at the same
    time. Raises QuotaExceeded.

    Plans that a worker has to compute count for the project. Each key creates as many from files that are prepared
    already: so a key that may only read does not use up the plans of the others.
    """
    project = project_of(session, caller.project_id)
    standing = standing_of(session, project, "plans_per_day", now=now)
    if not is_computed:
        today = ledger.day_of(now) * DAY_SECONDS
        of_key = (Plan.project_id == project.id, Plan.created_at >= today, Plan.created_by == caller.api_key_id)
        standing = replace(standing, used=session.scalar(select(func.count()).where(*of_key)) or 0)
    if standing.is_reached:
        raise exceeded(project, standing, now=now)


def check_resumption(session: Session, project_id: str, *, now: float) -> None:
    """One more job that waits, and was created before; otherwise as `check_submission`. Raises QuotaExceeded."""
    project = project_of(session, project_id)
    if project.max_queued_jobs is None:
        return
    serialize(session, f"quota {project.id}")
    standing = standing_of(session, project, "queued_jobs", now=now)
    if standing.is_reached:
        raise exceeded(project, standing, now=now)


def check_priority(session: Session, caller: Caller, priority: Priority) -> None:
    """Whether the caller's project and key may have a job of this class. Raises Forbidden.

    The key is read here: the code that creates the trials of a sweep has only its id.
    """
    project, key = project_of(session, caller.project_id), get_once(session, ApiKey, caller.api_key_id, lock="share")
    raised = f"--highest-priority {priority}"
    if PriorityClass[priority] < project.highest_priority:
        raise _too_high(
            f"project {project.name!r}",
            project.highest_priority,
            priority,
            f"lorry projects limit {project.name} {raised}",
        )
    if key is not None and PriorityClass[priority] < key.highest_priority:
        raise _too_high(f"API key {key.name!r}", key.highest_priority, priority, f"lorry keys limit {key.id} {raised}")


def project_of(session: Session, project_id: str) -> Project:
    project = get_once(session, Project, project_id)
    assert project is not None, "no project is ever deleted"
    return project


def _too_high(owner: str, highest: int, priority: Priority, command: str) -> Forbidden:
    allowed = PriorityClass(highest).name
    return Forbidden(
        f"The priority {priority!r} is above {allowed!r}, the highest priority of the {owner}.",
        code="priority_too_high",
        remedy=f"Use {allowed!r} or a lower priority, or ask an operator to raise the maximum: {command}.",
        param="priority",
    )


def enough_at(leaving: Iterable[tuple[int, float]], num_needed: int, *, now: float) -> float | None:
    """When so much has left, of what leaves each by a time of its own; None: not by itself, or nobody knows when."""
    num_left = 0
    for number, at in sorted(leaving, key=lambda one: one[1]):
        num_left += number if at > now else 0  # what should have left by now may stay as long again
        if num_left >= num_needed:
            return at
    return None


def holds(session: Session, *, now: float, project_ids: Collection[str] | None = None) -> dict[str, QuotaStatus]:
    """By project the limit for which none of its jobs is begun now. None: of all projects."""
    limited = select(Project).where(CAN_HOLD)
    if project_ids is not None:
        limited = limited.where(Project.id.in_(project_ids))
    found: dict[str, QuotaStatus] = {}
    for project in session.scalars(limited):
        names: tuple[Limit, ...] = ("concurrent_jobs", "device_hours_per_month")
        reached = (standing_of(session, project, name, now=now) for name in names)
        held = next((standing for standing in reached if standing.is_reached), None)
        if held is not None:
            found[project.id] = held
    return found


def beginnable(session: Session, jobs: Mapping[str, Job]) -> set[str]:
    """Of jobs that are to be claimed, best first and by id, those that their projects' limits let begin.

    Until this transaction ends, nobody else begins one of such a project.
    """
    free = free_places(session, {job.project_id for job in jobs.values()}, is_claim=True)
    begun: set[str] = set()
    for job_id, job in jobs.items():
        free[job.project_id] = free.get(job.project_id, math.inf) - 1
        begun |= {job_id} if free[job.project_id] >= 0 else set()
    return begun


def free_places(session: Session, project_ids: Collection[str], *, is_claim: bool = False) -> dict[str, float]:
    """Of those of the projects that may train only so many jobs at once: how many more they may begin.

    is_claim: nobody else begins one of theirs until this transaction ends.
    """
    capped = select(Project.id, Project.max_concurrent_jobs).where(
        Project.id.in_(project_ids), Project.max_concurrent_jobs.is_not(None)
    )
    free: dict[str, float] = {}
    for row in session.execute(capped.order_by(Project.id)):
        if is_claim:
            serialize(session, f"begin {row.id}")
        free[row.id] = row.max_concurrent_jobs - _count(session, row.id, JobState.RUNNING)
    return free


def check_key(session: Session, caller: Caller, *, num_jobs: int = 1, now: float, is_promised: bool = False) -> None:
    """So many jobs more than those of the last 24 hours, whatever became of these, and those that the key's sweeps are
    still to make. is_promised: they are among the latter. Raises RateLimited."""
    most = caller.service_jobs_per_day if caller.jobs_per_day is None else caller.jobs_per_day
    if most == 0:
        return
    serialize(session, f"jobs a day {caller.api_key_id}")
    promised = 0 if is_promised else _promised(session, caller.api_key_id)  # read first: they become jobs meanwhile
    since = (Job.created_by == caller.api_key_id, Job.created_at > now - DAY_SECONDS)
    raised = "An operator can give the key a higher limit: lorry keys limit."
    message, code = f"The API key has reached its limit of {most} jobs a day.", "rate_limit_exceeded"
    message += f" Its sweeps are still to make {promised:,} of them." if promised else ""
    num_more = num_jobs + promised
    if num_more > most:
        fewer = "Close or cancel one of those sweeps, or ask for fewer" if promised else "Ask for fewer"
        remedy = f"{fewer} at once. {raised}"
        raise RateLimited(message, code=code, remedy=remedy, retry_after_seconds=math.inf, headers={})
    latest = select(Job.created_at).where(*since).order_by(Job.created_at.desc())
    earliest = session.scalar(latest.offset(most - num_more).limit(1))
    if earliest is not None:
        again = earliest + DAY_SECONDS
        remedy = f"Try again at {utc_time(again)}. {raised}"
        raise RateLimited(message, code=code, remedy=remedy, retry_after_seconds=again - now, headers={})


def _promised(session: Session, api_key_id: str) -> int:
    """Trials that the key's sweeps are still to make by themselves."""
    search = Sweep.requested["search"]["type"].as_string()
    left = select(func.coalesce(func.sum(Sweep.num_trials - Sweep.num_created), 0)).where(
        Sweep.created_by == api_key_id, Sweep.finished_at.is_(None), Sweep.is_closed.is_(False), search != "ask_tell"
    )
    return int(session.scalar(left) or 0)


def standing_of(session: Session, project: Project, name: Limit, *, now: float) -> QuotaStatus:
    most: float | None = getattr(project, COLUMNS[name])
    used, resets_at = 0.0, None
    match name:
        case "concurrent_jobs":
            used = _count(session, project.id, JobState.RUNNING, most=most)
        case "queued_jobs":
            used = _count(session, project.id, *WAITING, most=most)
        case "jobs_per_day":
            today = ledger.day_of(now)
            used, resets_at = (
                ledger.total(session, project.id, "num_created", first_day=today),
                (today + 1) * DAY_SECONDS,
            )
        case "plans_per_day":
            today = ledger.day_of(now)
            used, resets_at = (
                ledger.total(session, project.id, "num_plans", first_day=today),
                (today + 1) * DAY_SECONDS,
            )
        case "device_hours_per_month":
            used, resets_at = ledger.month_seconds(session, project.id, now=now) / 3600, ledger.next_month(now)
        case "stored_bytes":
            used = ledger.stored_bytes(session, project.id)
    return QuotaStatus(name=name, limit=most, used=used, resets_at=resets_at)


def _count(session: Session, project_id: str, *states: JobState, most: float | None = None) -> int:
    """Jobs of the project in these states; no further than needed."""
    found = 0
    for state in states:
        some = select(Job.id).where(Job.state == state, Job.project_id == project_id)
        if most is not None:
            some = some.limit(int(most) + 1)
        found += session.scalar(select(func.count()).select_from(some.subquery())) or 0
    return found


def exceeded(project: Project, standing: QuotaStatus, *, now: float, num_more: int = 0) -> QuotaExceeded:
    used = f"{standing.used:,.4g}" if standing.name == "device_hours_per_month" else f"{standing.used:,.0f}"
    more = f", and this would be {num_more:,} more" if num_more else ""
    resets = f" It begins anew at {utc_time(standing.resets_at)}." if standing.resets_at is not None else ""
    message = f"The project {project.name!r} may have {standing.said()}; it has {used}{more}.{resets}"
    return refusal(project, standing, message, REMEDIES[standing.name], now=now)


def refusal(project: Project, standing: QuotaStatus, message: str, remedy: str, *, now: float) -> QuotaExceeded:
    return QuotaExceeded(
        message,
        code="quota_exceeded",
        remedy=f"{remedy} An operator can raise the limit: lorry projects limit {project.name}.",
        retry_after_seconds=math.inf if standing.resets_at is None else standing.resets_at - now,
        quota={
            "name": standing.name,
            "limit": standing.limit,
            "used": standing.used,
            "resets_at": None if standing.resets_at is None else int(standing.resets_at),
        },
    )


def utc_time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(math.ceil(seconds), UTC):%Y-%m-%d %H:%M:%S} UTC"
