"""Quotas of projects, the daily job limit of API keys, and the highest priority of both. Operators set them.

Where each quota applies:

- A submission is rejected for too many queued jobs, too many jobs per day, or no device-hours left this month.
- Jobs stay in the queue while their project has too many running jobs or no device-hours left this month.
- An upload, and a job or plan whose files a worker has to prepare, is rejected for too many stored bytes.
- A plan is rejected for too many plans per day.
- An inference request is rejected for too many tokens per day. Requests of batches wait until the next day.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import ScalarSelect, func, or_, select
from sqlalchemy.orm import Session

from catalog.audit import log
from catalog.caller import Caller
from catalog.db.database import Database, get_once, read_clock, serialize
from catalog.errors import Forbidden, QuotaExceeded, RateLimited, listed
from catalog.states import JobState, Priority, PriorityClass
from catalog.tables.jobs import Job, Plan, Sweep
from catalog.tables.table import Json
from catalog.tables.tenancy import ApiKey, Project
from catalog.tenancy import projects
from catalog.usage import ledger
from catalog.usage.ledger import DAY_SECONDS

Limit = Literal[
    "concurrent_jobs",
    "queued_jobs",
    "jobs_per_day",
    "device_hours_per_month",
    "stored_bytes",
    "plans_per_day",
    "tokens_per_day",
]
NEEDING = "this request needs"
PREPARE_LESS = "Use smaller files, or cancel jobs and delete plans whose files still have to be prepared."
WAITING = (JobState.VALIDATING_FILES, JobState.QUEUED)
CAN_HOLD = or_(Project.max_concurrent_jobs.is_not(None), Project.max_device_hours_per_month.is_not(None))
"""In a query: the project has a quota that can keep its jobs in the queue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """A kind of limit that a project may have."""

    name: Limit
    noun: str
    """The counted thing, in the singular."""
    period: Literal["day", "month"] | None = None
    """After which the usage is reset to zero, in UTC."""
    used: Callable[[Session, Project, float], float]
    """Reads the usage at a time."""
    option: str
    """The option of `lorry projects update`."""
    remedy: str = ""
    """A fix other than a higher limit. Empty: only the end of the period."""

    def limit_of(self, project: Project) -> float | None:
        return getattr(project, self.column)

    @property
    def column(self) -> str:
        """Column of the table of projects that has the limit."""
        return f"max_{self.name}"

    def resets_at(self, now: float) -> float | None:
        match self.period:
            case "day":
                return (ledger.day_of(now) + 1) * DAY_SECONDS
            case "month":
                return ledger.next_month(now)
            case None:
                return None


def _today(*amounts: ledger.Amount) -> Callable[[Session, Project, float], float]:
    """Return a function that adds up these amounts of today."""
    return lambda session, project, now: sum(
        ledger.total(session, project.id, amount, first_day=ledger.day_of(now)) for amount in amounts
    )


QUOTAS: dict[Limit, Quota] = {
    quota.name: quota
    for quota in (
        Quota(
            name="concurrent_jobs",
            noun="concurrent job",
            used=lambda session, project, _: _count(
                session, project.id, JobState.RUNNING, maximum=project.max_concurrent_jobs
            ),
            option="--limit-concurrent-jobs",
            remedy="Wait until a running job finishes.",
        ),
        Quota(
            name="queued_jobs",
            noun="queued job",
            used=lambda session, project, _: _count(session, project.id, *WAITING, maximum=project.max_queued_jobs),
            option="--limit-queued-jobs",
            remedy="Wait until a queued job starts, or cancel one.",
        ),
        Quota(
            name="jobs_per_day",
            noun="job",
            period="day",
            used=_today("num_created"),
            option="--limit-jobs-per-day",
        ),
        Quota(
            name="device_hours_per_month",
            noun="device-hour",
            period="month",
            used=lambda session, project, now: ledger.month_seconds(session, project.id, now=now) / 3600,
            option="--limit-device-hours",
        ),
        Quota(
            name="stored_bytes",
            noun="stored byte",
            used=lambda session, project, _: ledger.stored_bytes(session, project.id),
            option="--limit-stored-bytes",
            remedy="Delete files, adapters or exports that you no longer need.",
        ),
        Quota(
            name="plans_per_day",
            noun="plan",
            period="day",
            used=_today("num_plans"),
            option="--limit-plans-per-day",
        ),
        Quota(
            name="tokens_per_day",
            noun="inference token",
            period="day",
            used=_today("prompt_tokens", "completion_tokens"),
            option="--limit-tokens-per-day",
        ),
    )
}
"""All quotas. A new one also needs the column, a field of `api.schemas.projects.ProjectLimits`, and a check."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuotaStatus:
    """A quota of a project and its current usage. limit: None: no limit."""

    quota: Quota
    limit: float | None
    used: float
    resets_at: float | None
    """When `used` is reset to zero; None if it has no fixed time."""

    @property
    def name(self) -> Limit:
        return self.quota.name

    @property
    def is_reached(self) -> bool:
        return self.limit is not None and self.used >= self.limit

    def values(self) -> Json:
        """Return the quota as in errors and in explanations of the API."""
        resets_at = None if self.resets_at is None else int(self.resets_at)
        return {"name": self.name, "limit": self.limit, "used": self.used, "resets_at": resets_at}

    def describe(self) -> str:
        """Return the limit with its unit, such as "4 queued jobs"."""
        limit, noun = self.limit or 0, self.quota.noun
        per = f" per {self.quota.period}" if self.quota.period else ""
        return f"{_number(limit)} {noun}{'' if limit == 1 else 's'}{per}"


def statuses(db: Database, *, caller: Caller, project: str) -> tuple[Project, list[QuotaStatus]]:
    """Return the project with this id or name, and all its quotas. Raises NotFound."""
    with db.read() as session:
        row = projects.find(session, caller=caller, project=project)
        now = read_clock(session)
        return row, [status_of(session, row, name, now=now) for name in QUOTAS]


def limit(
    db: Database,
    *,
    caller: Caller,
    project: str,
    limits: Mapping[Limit, float | None],
    highest_priority: Priority | None = None,
) -> Project:
    """Change the given quotas; None: no limit. highest_priority: None: unchanged.

    What exceeds a new quota already stays, and jobs keep their priority. Raises NotFound.
    """
    with db.write() as session:
        row = projects.find(session, caller=caller, project=project)
        for name, value in limits.items():
            setattr(row, QUOTAS[name].column, value)
        details: Json = {"limits": dict(limits)}
        if highest_priority is not None:
            row.highest_priority = PriorityClass[highest_priority]
            details["limits"]["highest_priority"] = highest_priority
        log.note(
            session, "project.updated", now=read_clock(session), object_id=row.id, project_id=row.id, details=details
        )
        return row


def check_submission(session: Session, caller: Caller, *, now: float, is_promised: bool = False) -> None:
    """Check that one more job may be submitted, in the transaction that creates it.

    Until it ends, no other transaction checks these quotas of the project. is_promised: see check_key. Raises
    QuotaExceeded, and RateLimited for the daily job limit of the key.
    """
    check_key(session, caller, now=now, is_promised=is_promised)
    _check(session, caller.project_id, "queued_jobs", "jobs_per_day", "device_hours_per_month", now=now)


def check_plan(session: Session, caller: Caller, *, is_computed: bool, now: float) -> None:
    """Check that one more plan may be created, in the transaction that creates it. The caller has serialized the
    creation of plans of the project. Raises QuotaExceeded.

    Plans that a worker has to compute count for the project. Plans from files that are already prepared count for the
    key, with the same limit. Otherwise a key with read access only could use up the plans of other keys.
    """
    project = project_of(session, caller.project_id)
    status = status_of(session, project, "plans_per_day", now=now)
    if not is_computed:
        today = ledger.day_of(now) * DAY_SECONDS
        of_key = (Plan.project_id == project.id, Plan.created_at >= today, Plan.created_by == caller.api_key_id)
        status = replace(status, used=session.scalar(select(func.count()).where(*of_key)) or 0)
    if status.is_reached:
        raise exceeded(project, status, now=now, key_id=None if is_computed else caller.api_key_id)


def check_tokens(session: Session, project_id: str, *, now: float) -> None:
    """Check that the project may send an inference request. Raises QuotaExceeded.

    Tokens count when a request has been answered, so requests that run at the same time may exceed the quota.
    """
    _check(session, project_id, "tokens_per_day", now=now, is_serialized=False)


def check_resumption(session: Session, project_id: str, *, now: float) -> None:
    """Check that an existing job may return to the queue, as `check_submission` does. Raises QuotaExceeded."""
    _check(session, project_id, "queued_jobs", now=now)


def _check(session: Session, project_id: str, *names: Limit, now: float, is_serialized: bool = True) -> None:
    """Raises QuotaExceeded for the first of these quotas that is reached.

    is_serialized: until this transaction ends, no other one checks quotas of the project.
    """
    project = project_of(session, project_id)
    limited: list[Limit] = [name for name in names if QUOTAS[name].limit_of(project) is not None]
    if limited and is_serialized:
        serialize(session, f"quota {project.id}")
    for name in limited:
        status = status_of(session, project, name, now=now)
        if status.is_reached:
            raise exceeded(project, status, now=now)


def check_priority(session: Session, caller: Caller, priority: Priority) -> None:
    """Raises Forbidden if the priority is above the highest one of the caller's project or key.

    The key is read here, because the code that creates the trials of a sweep has only its id.
    """
    project, key = project_of(session, caller.project_id), get_once(session, ApiKey, caller.api_key_id, lock="share")
    limits = [(project.highest_priority, f"project {project.name!r}", f"lorry projects update {project.name}")]
    if key is not None:
        limits.append((key.highest_priority, f"API key {key.name!r}", f"lorry keys update {key.id}"))
    below = [limit for limit in limits if PriorityClass[priority] < limit[0]]
    if below:
        highest, owner, _ = max(below, key=lambda limit: limit[0])
        raise _too_high(owner, highest, priority, [command for _, _, command in below])


def highest_priority(session: Session, caller: Caller) -> PriorityClass:
    """Return the highest priority class that the caller's project and key allow."""
    project, key = project_of(session, caller.project_id), get_once(session, ApiKey, caller.api_key_id, lock="share")
    limits = [project.highest_priority, *([key.highest_priority] if key is not None else [])]
    return PriorityClass(max(limits))


def project_of(session: Session, project_id: str) -> Project:
    project = get_once(session, Project, project_id)
    assert project is not None, "no project is ever deleted"
    return project


def _too_high(owner: str, highest: int, priority: Priority, commands: Sequence[str]) -> Forbidden:
    """owner: who has the lowest maximum, `highest`. commands: raise each maximum that is below the priority."""
    allowed = PriorityClass(highest).name
    raising = listed([f"`{command} --highest-priority {priority}`" for command in commands])
    return Forbidden(
        "priority_too_high_for_highest" if highest == max(PriorityClass) else "priority_too_high",
        priority=priority,
        allowed=allowed,
        owner=owner,
        raising=raising,
        param="priority",
    )


def enough_at(leaving: Iterable[tuple[int, float]], num_needed: int, *, now: float) -> float | None:
    """Return when at least `num_needed` will have been freed. leaving: pairs of amount and latest time.

    None: waiting alone will not free enough, or the time is not known.
    """
    num_left = 0
    for number, at in sorted(leaving, key=lambda one: one[1]):
        num_left += number if at > now else 0  # an overdue amount may stay for an unknown time
        if num_left >= num_needed:
            return at
    return None


def holds(session: Session, *, now: float, project_ids: Collection[str] | None = None) -> dict[str, QuotaStatus]:
    """Return by project the quota that currently prevents its jobs from starting. project_ids: None: all projects."""
    limited = select(Project).where(CAN_HOLD)
    if project_ids is not None:
        limited = limited.where(Project.id.in_(project_ids))
    found: dict[str, QuotaStatus] = {}
    for project in session.scalars(limited):
        names: tuple[Limit, ...] = ("concurrent_jobs", "device_hours_per_month")
        reached = (status_of(session, project, name, now=now) for name in names)
        held = next((status for status in reached if status.is_reached), None)
        if held is not None:
            found[project.id] = held
    return found


def startable(session: Session, jobs: Mapping[str, Job]) -> set[str]:
    """Return the ids of the jobs that the quotas of their projects allow to start. jobs: by id, the best first."""
    free = free_places(session, {job.project_id for job in jobs.values()})
    startable_ids: set[str] = set()
    for job_id, job in jobs.items():
        free[job.project_id] = free.get(job.project_id, math.inf) - 1
        startable_ids |= {job_id} if free[job.project_id] >= 0 else set()
    return startable_ids


def free_places(session: Session, project_ids: Collection[str]) -> dict[str, float]:
    """Return how many more jobs each project with a quota of concurrent jobs may start."""
    capped = select(Project.id, Project.max_concurrent_jobs).where(
        Project.id.in_(project_ids), Project.max_concurrent_jobs.is_not(None)
    )
    free: dict[str, float] = {}
    for row in session.execute(capped.order_by(Project.id)):
        free[row.id] = row.max_concurrent_jobs - _count(session, row.id, JobState.RUNNING)
    return free


def check_key(session: Session, caller: Caller, *, num_jobs: int = 1, now: float, is_promised: bool = False) -> None:
    """Check the daily job limit of the key for `num_jobs` more. Raises RateLimited.

    All jobs that the key created in the last 24 hours count, and the trials that its sweeps still have to create.
    is_promised: the new jobs are among these trials.
    """
    maximum = caller.service_jobs_per_day if caller.jobs_per_day is None else caller.jobs_per_day
    if maximum == 0:
        return
    serialize(session, f"jobs a day {caller.api_key_id}")
    promised = 0 if is_promised else _promised(session, caller.api_key_id)  # before jobs: trials become jobs
    since = (Job.created_by == caller.api_key_id, Job.created_at > now - DAY_SECONDS)
    key = f"{caller.name!r} ({caller.api_key_id})"
    names = {"key": key, "key_id": caller.api_key_id, "limit": counted(maximum, "job")}
    num_more = num_jobs + promised
    if num_more > maximum and promised:
        values = {**names, "num_promised": promised}
        raise RateLimited("daily_jobs_promised_to_sweeps", **values, retry_after_seconds=math.inf, headers=None)
    if num_more > maximum:
        values = {**names, "num_jobs": num_jobs}
        raise RateLimited("daily_jobs_fewer_than_requested", **values, retry_after_seconds=math.inf, headers=None)
    latest = select(Job.created_at).where(*since).order_by(Job.created_at.desc())
    earliest = session.scalar(latest.offset(maximum - num_more).limit(1))
    if earliest is not None:
        again = earliest + DAY_SECONDS
        name = "daily_jobs_reached" if num_jobs == 1 else "daily_jobs_exceeded"
        values = {**names, "num_jobs": num_jobs, "num_promised": promised, "time": utc_time(again)}
        raise RateLimited(
            f"{name}_with_sweeps" if promised else name, **values, retry_after_seconds=again - now, headers=None
        )


def _promised(session: Session, api_key_id: str) -> int:
    """Return the number of trials that the controller still has to create for the key's sweeps."""
    remaining = select(func.sum(Sweep.num_trials - Sweep.num_created)).where(
        Sweep.created_by == api_key_id, Sweep.finished_at.is_(None), Sweep.is_closed.is_(False)
    )
    return int(session.scalar(remaining) or 0)


def status_of(session: Session, project: Project, name: Limit, *, now: float) -> QuotaStatus:
    quota = QUOTAS[name]
    return QuotaStatus(
        quota=quota,
        limit=quota.limit_of(project),
        used=quota.used(session, project, now),
        resets_at=quota.resets_at(now),
    )


def _count(session: Session, project_id: str, *states: JobState, maximum: float | None = None) -> int:
    """Count the project's jobs in these states, for each state up to `maximum` + 1.

    One statement counts all states, so that a job which changes its state meanwhile counts once.
    """
    counts: list[ScalarSelect[int]] = []
    for state in states:
        some = select(Job.id).where(Job.state == state, Job.project_id == project_id)
        if maximum is not None:
            some = some.limit(int(maximum) + 1)
        counts.append(select(func.count()).select_from(some.subquery()).scalar_subquery())
    return sum(session.execute(select(*counts)).one())


def exceeded(
    project: Project,
    status: QuotaStatus,
    *,
    now: float,
    num_more: int = 0,
    needing: str = NEEDING,
    key_id: str | None = None,
) -> QuotaExceeded:
    """Return the error for a quota that is reached, or that `num_more` would exceed.

    needing: for the message, what needs them. key_id: the key that has reached the quota, if the quota counts by key.
    """
    name = "quota_reached" if key_id is None else "quota_of_key_reached"
    return refusal(
        "quota_would_be_exceeded" if num_more else name,
        project=project,
        status=status,
        now=now,
        used=_number(status.used),
        advice=_advice(status, num_more, needing),
        needing=needing,
        num_more=num_more,
        key=key_id or "",
    )


def _advice(status: QuotaStatus, num_more: int, needing: str) -> str:
    """Return what helps other than a higher limit, as a sentence."""
    if not status.limit:
        return "A limit of 0 allows none."
    if num_more > status.limit:
        return "Use smaller files." if needing == NEEDING else PREPARE_LESS
    if status.resets_at is not None:
        return f"Wait until the usage resets at {utc_time(status.resets_at)}."
    return status.quota.remedy


def refusal(name: str, /, *, project: Project, status: QuotaStatus, now: float, **values: str | float) -> QuotaExceeded:
    """name: of the text. The values for its project, limit and option are added."""
    return QuotaExceeded(
        name,
        project=project.name,
        limit=status.describe(),
        option=status.quota.option,
        retry_after_seconds=math.inf if status.resets_at is None else status.resets_at - now,
        quota=status.values(),
        **values,
    )


def _number(value: float) -> str:
    return f"{value:,.4f}".rstrip("0").rstrip(".")


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def utc_time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(math.ceil(seconds), UTC):%Y-%m-%d %H:%M:%S} UTC"
