"""Reports usage by day, and for each day by organization, project or base model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.caller import Caller
from catalog.db.database import Database, read_clock
from catalog.errors import InvalidRequest
from catalog.tables.tenancy import Organization, Project, StoredDay, UsageDay
from catalog.usage import ledger
from catalog.usage.ledger import AMOUNTS

_Key = tuple[int, str | None, str | None, str | None]
"""Day, organization, project, base model."""
GroupBy = Literal["organization_id", "project_id", "model"]
_COLUMNS = {
    "organization_id": Project.organization_id,
    "project_id": UsageDay.project_id,
    "model": UsageDay.base_model.label("model"),
}
MOST_DAYS = 31


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageQuery:
    """Parameters of a report. Times are in seconds since 1970. Days are in UTC, and each day is reported as a whole."""

    start_time: float
    end_time: float | None = None
    """None: now."""
    group_by: Sequence[GroupBy] = ("project_id",)
    project_ids: Sequence[str] = ()
    """Both by id or name; empty: all that the caller can see."""
    organization_ids: Sequence[str] = ()
    models: Sequence[str] = ()
    num_days: int = 7
    page: int | None = None
    """First day of the page; None: the first page."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """The usage of one day and group. Fields that the report is not grouped by are None."""

    organization_id: str | None
    project_id: str | None
    model: str | None
    amounts: dict[str, float]
    stored_bytes: int | None = None
    """None in a report by base model, because stored bytes have none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Day:
    day: int
    used: list[Used] = field(default_factory=list[Used])


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    days: list[Day]
    next_day: int | None
    """The first day of the next page; None: there is none."""


def report(db: Database, *, caller: Caller, query: UsageQuery) -> Report:
    """Return a page of days, the earliest first. Raises InvalidRequest if the period ends before it begins."""
    with db.read() as session:
        end_time = read_clock(session) if query.end_time is None else query.end_time
        _check_period(query, end_time)
        first, last = ledger.day_of(query.start_time), ledger.day_of(end_time - 1e-6)
        if query.page is not None:
            if query.page > last:
                raise InvalidRequest("page_beyond_end", page=query.page, param="page")
            first = max(first, query.page)
        past = min(last + 1, first + query.num_days)
        seen = _seen(session, caller, query)
        days = _days(session, query, seen, first, past)
        return Report(days=days, next_day=past if past <= last else None)


def _check_period(query: UsageQuery, until: float) -> None:
    """until: of the query, or the current time. Raises InvalidRequest if the period ends before it begins."""
    if until <= query.start_time:
        raise InvalidRequest(
            "start_time_in_future" if query.end_time is None else "start_time_after_end_time",
            start_time=query.start_time,
            until=until,
            param="start_time",
        )


def _seen(session: Session, caller: Caller, query: UsageQuery) -> dict[str, str]:
    """Return the requested projects that the caller can see, each with its organization, by id. Others are ignored."""
    projects = select(Project.id, Project.organization_id)
    if not caller.is_operator:
        projects = projects.where(Project.id == caller.project_id)
    if named := query.project_ids:
        projects = projects.where(Project.id.in_(named) | Project.name.in_(named))
    if named := query.organization_ids:
        projects = projects.join(Organization, Organization.id == Project.organization_id)
        projects = projects.where(Organization.id.in_(named) | Organization.name.in_(named))
    return {row[0]: row[1] for row in session.execute(projects.order_by(Project.id))}


def _days(session: Session, query: UsageQuery, seen: dict[str, str], first: int, past: int) -> list[Day]:
    sums = _sums(session, query, seen, first, past)
    if "model" not in query.group_by and not query.models:
        for (day, project_id), num_bytes in _stored(session, seen, first, past).items():
            owner = seen[project_id] if "organization_id" in query.group_by else None
            key = (day, owner, project_id if "project_id" in query.group_by else None, None)
            nothing: dict[str, float] = dict.fromkeys(AMOUNTS, 0.0)
            used = sums.get(key) or Used(organization_id=owner, project_id=key[2], model=None, amounts=nothing)
            sums[key] = replace(used, stored_bytes=(used.stored_bytes or 0) + num_bytes)
    found: defaultdict[int, list[Used]] = defaultdict(list)
    for key in sorted(sums, key=lambda key: (key[0], *(name or "" for name in key[1:]))):
        found[key[0]].append(sums[key])
    return [Day(day=day, used=found[day]) for day in range(first, past)]


def _sums(session: Session, query: UsageQuery, seen: Collection[str], first: int, past: int) -> dict[_Key, Used]:
    columns = [column for name, column in _COLUMNS.items() if name in query.group_by]
    amounts = [func.sum(getattr(UsageDay, name)).label(name) for name in AMOUNTS]
    wanted = select(UsageDay.day, *columns, *amounts).join(Project, Project.id == UsageDay.project_id)
    wanted = wanted.where(UsageDay.project_id.in_(seen), UsageDay.day >= first, UsageDay.day < past)
    if query.models:
        wanted = wanted.where(UsageDay.base_model.in_(query.models))
    sums: dict[_Key, Used] = {}
    for row in session.execute(wanted.group_by(UsageDay.day, *columns)).mappings():
        owner, project_id, model = (row.get(name) for name in _COLUMNS)
        amounts_of_row = {name: row[name] for name in AMOUNTS}
        used = Used(organization_id=owner, project_id=project_id, model=model, amounts=amounts_of_row)
        sums[row["day"], owner, project_id, model] = used
    return sums


def _stored(session: Session, seen: Collection[str], first: int, past: int) -> dict[tuple[int, str], int]:
    """Return the stored bytes by day and project at the end of each day, up to today.

    A day without a change has the value of the previous day.
    """
    before = select(StoredDay.num_bytes).where(StoredDay.project_id == Project.id, StoredDay.day < first)
    latest = before.order_by(StoredDay.day.desc()).limit(1).correlate(Project).scalar_subquery()
    stored: dict[str, int | None] = {
        row[0]: row[1] for row in session.execute(select(Project.id, latest).where(Project.id.in_(seen)))
    }
    changes = select(StoredDay).where(StoredDay.project_id.in_(seen), StoredDay.day >= first, StoredDay.day < past)
    changed = {(row.day, row.project_id): row.num_bytes for row in session.scalars(changes)}
    found: dict[tuple[int, str], int] = {}
    for day in range(first, min(past, ledger.day_of(read_clock(session)) + 1)):
        stored |= {project_id: changed[day, project_id] for project_id in seen if (day, project_id) in changed}
        found |= {(day, project_id): num_bytes for project_id, num_bytes in stored.items() if num_bytes is not None}
    return found
