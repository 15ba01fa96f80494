"""Selects the candidates of a scheduling decision: the first jobs of each project and class.

An index finds each of them. The number of rows read grows with the number of projects that have waiting jobs, not with
the queue. Statements are built once and cached, because building one takes longer than executing it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Row,
    Select,
    and_,
    bindparam,
    case,
    func,
    literal,
    or_,
    select,
    true,
    union_all,
)
from sqlalchemy.orm import Session, aliased

from catalog.db.database import each_of, is_sqlite
from catalog.resources.sharding import GATHERED_BLOCKS, SINGLE, DeviceGroup, ShardingStrategy, ShardsWhen
from catalog.scheduling.snapshot import Candidate
from catalog.states import MAX_ENDS_IN_COMPANY, JobState, PriorityClass, is_suspect
from catalog.tables.jobs import Job
from catalog.tables.tenancy import Project
from catalog.usage import quotas

NEEDS = ("own_bytes", "saved_bytes", "trainer_bytes", "slice_bytes", "shardable_bytes", "gathered_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateFilter:
    """Restricts the queued jobs that `waiting` returns. With neither `alone` nor `alike`, any claimable job matches."""

    alone: bool = False
    """Jobs that fit if they have a trainer of their own."""
    alike: bool = False
    """Jobs of one pack key that fit next to packmates or, with `alone`, without any. Excludes jobs that must train
    alone."""
    recomputes: bool = False
    """The device uses activation checkpointing if memory is short."""
    priority: int | None = None
    """Only jobs of this class."""
    without_quantizations: tuple[str, ...] = ()
    """Excludes jobs that need their base model quantized in one of these ways."""
    shards_when: ShardsWhen = "never"
    """When the device group shards the base model. `waiting` sets it."""
    tried_less: bool = False
    """Only jobs with at most `num_ends` counted attempts."""
    holding: ShardingStrategy = "replicated"
    """With `alike`: how the trainer holds the base model."""


def waiting(
    session: Session,
    wanted: CandidateFilter,
    *,
    now: float,
    per_group: int,
    num_bytes: int = 0,
    key: str | None = None,
    group: DeviceGroup = SINGLE,
    num_ends: int = 0,
) -> list[Candidate]:
    """Return the first `per_group` claimable jobs of each project and class that match `wanted`, unsorted.

    Skips projects that have reached a limit. num_bytes: free bytes on each device of the group. num_ends: the maximum
    number of counted attempts if `wanted.tried_less` is set.
    """
    wanted = replace(wanted, shards_when=group.shards_when)
    free_bytes = num_bytes - group.reserve_bytes if wanted.alone else num_bytes
    asked = {"now": now, "per_group": per_group, "num_bytes": free_bytes, "key": key, "num_ends": num_ends}
    asked |= {"num_devices": group.num_devices, "usable_bytes": group.usable_bytes}
    asked |= {"host_bytes": group.host_limit_bytes, "keeps_shares": int(group.keeps_shares)}
    rows = session.execute(_waiting(wanted, for_sqlite=is_sqlite(session)), asked).all()
    limited = {row.project_id for row in rows if row.is_limited}
    limited_projects = quotas.holds(session, now=now, project_ids=limited) if limited else ()
    return [_candidate(row) for row in rows if row.project_id not in limited_projects]


def is_due(job: type[Job], now: float | ColumnElement[float]) -> ColumnElement[bool]:
    """Condition for jobs that are not in a back-off after a failed attempt."""
    return or_(job.run_after.is_(None), job.run_after <= now)


def num_groups(session: Session) -> int:
    """Return the number of (project, class) pairs that have a queued job."""
    return session.scalar(_num_groups()) or 0


def projects(state: JobState) -> CTE:
    """The ids of projects that have a job in `state`, and a last row that is NULL. Each costs one index lookup."""
    found = select(func.min(Job.project_id).label("project_id")).where(Job.state == state).cte("found", recursive=True)
    job = aliased(Job)
    following = select(func.min(job.project_id)).where(job.state == state, job.project_id > found.c.project_id)
    return found.union_all(select(following.scalar_subquery()).where(found.c.project_id.is_not(None)))


@cache
def _waiting(wanted: CandidateFilter, *, for_sqlite: bool) -> Select[*tuple[Any, ...]]:
    groups, job = _groups(JobState.QUEUED, wanted.priority), aliased(Job)
    conditions = [is_due(job, bindparam("now"))]
    if wanted.alike:
        trains_alone = job.counted_attempts + job.lost_attempts >= MAX_ENDS_IN_COMPANY
        conditions += [job.queued_at.is_not(None), job.pack_key == bindparam("key"), ~trains_alone]
    else:
        conditions += [job.state == JobState.QUEUED]
    if wanted.alone or wanted.alike:
        conditions += [_fits(job, wanted)]
        groups = _where_some_fit(groups, wanted)
    if wanted.tried_less:
        conditions += [job.counted_attempts <= bindparam("num_ends")]
    conditions += [job.pack_key.not_like(f"%+{name}:%") for name in wanted.without_quantizations]
    names = (*("id", "project_id", "base_digest", "pack_key", "priority", "place", "queued_at"), *NEEDS)
    names = (*names, "counted_attempts", "lost_attempts", "preemption_requested_at")
    rows = each_of(groups, _firsts(groups, job, conditions), job, names, for_sqlite=for_sqlite).subquery()
    with_project = rows.join(Project, Project.id == rows.c.project_id)
    return select(*rows.c, quotas.CAN_HOLD.label("is_limited")).select_from(with_project)


@cache
def _num_groups() -> Select[int]:
    groups, job = _groups(JobState.QUEUED), aliased(Job)
    some = _firsts(groups, job, [job.state == JobState.QUEUED]).limit(1)
    return select(func.count()).select_from(groups).where(some.exists())


def _where_some_fit(groups: CTE, wanted: CandidateFilter) -> CTE:
    """The groups whose smallest job fits. Each other group costs one row, however many of its jobs wait."""
    job = aliased(Job)
    group = (job.project_id == groups.c.project_id, job.priority == groups.c.priority, job.queued_at.is_not(None))
    need, by = job.least_bytes - job.trainer_bytes, job.least_bytes
    if wanted.alone:  # no index contains the size of a shard, which therefore counts as 0 bytes
        need = by = job.least_bytes if wanted.shards_when == "never" else job.least_divided_bytes
    smallest = select(need).where(*group).order_by(by).limit(1).correlate(groups)
    if wanted.alike:
        smallest = smallest.where(job.pack_key == bindparam("key"))
    fitting = select(groups).where(smallest.scalar_subquery() <= bindparam("num_bytes"))
    # Materialized, because PostgreSQL may otherwise read the first jobs of all groups before it filters the groups.
    return fitting.cte("fitting_groups").prefix_with("MATERIALIZED", dialect="postgresql")


def _firsts(groups: CTE, job: type[Job], conditions: list[ColumnElement[bool]]) -> Select[str]:
    """The ids of the first jobs of one group that meet all conditions."""
    same_group = (job.project_id == groups.c.project_id, job.priority == groups.c.priority)
    same_group = (*same_group, job.is_held == groups.c.is_held)
    firsts = select(job.id).where(*conditions, *same_group).order_by(job.place, job.id)
    return firsts.limit(bindparam("per_group")).correlate(groups)


def _fits(job: type[Job], wanted: CandidateFilter) -> ColumnElement[bool]:
    """Condition for jobs that fit into `num_bytes`."""
    own = job.own_bytes - job.saved_bytes if wanted.recomputes else job.own_bytes
    whole = own + job.trainer_bytes
    need, is_trained = (whole if wanted.alone else own), true()
    if wanted.shards_when != "never":
        need_alone, is_trained = _strategy_columns(job, wanted, whole)
        need = need_alone if wanted.alone else own
    return and_(is_trained, need <= bindparam("num_bytes"))


def _strategy_columns(
    job: type[Job], wanted: CandidateFilter, whole: ColumnElement[int]
) -> tuple[ColumnElement[int], ColumnElement[bool]]:
    """(bytes that the job needs alone on each device under the group's strategy, whether the job can be trained so).

    The group's strategy is the one that `DeviceGroup.holding` chooses.
    """
    number, usable = bindparam("num_devices", type_=BigInteger), bindparam("usable_bytes", type_=BigInteger)
    share = (job.shardable_bytes + number - 1) // number
    rest = whole - job.shardable_bytes + job.gathered_bytes
    gathered = (job.gathered_bytes + GATHERED_BLOCKS * number - 1) // (GATHERED_BLOCKS * number)
    divided, offloaded = rest + share, rest + share * bindparam("keeps_shares") + gathered
    can_divide, host_holds = job.shardable_bytes > 0, job.shardable_bytes <= bindparam("host_bytes")
    if wanted.shards_when == "always":
        return divided, can_divide
    if wanted.shards_when == "offloaded":
        return offloaded, and_(can_divide, host_holds)
    is_spread = and_(can_divide, whole > usable)
    is_offloaded = and_(is_spread, divided > usable, host_holds)
    ways = {"replicated": ~is_spread, "sharded": and_(is_spread, ~is_offloaded), "offloaded": is_offloaded}
    need = case((is_offloaded, offloaded), (is_spread, divided), else_=whole)
    return need, ways[wanted.holding] if wanted.alike else true()


def _groups(state: JobState, only: int | None = None) -> CTE:
    """Every class, or the class `only`, of every project that has a job in `state`.

    Held jobs are excluded from the queue, but their files are prepared.
    """
    found = projects(state)
    wanted = PriorityClass if only is None else (only,)
    ways = (False,) if state == JobState.QUEUED else (False, True)
    each_class = (
        select(literal(int(priority)).label("priority"), literal(is_held).label("is_held"))
        for priority in wanted
        for is_held in ways
    )
    classes = union_all(*each_class).cte("classes")
    both = select(found.c.project_id, classes.c.priority, classes.c.is_held).join(classes, true())
    return both.where(found.c.project_id.is_not(None)).cte("project_classes")


def _candidate(row: Row[*tuple[Any, ...]]) -> Candidate:
    return Candidate(
        job_id=row.id,
        project_id=row.project_id,
        base_digest=row.base_digest,
        pack_key=row.pack_key,
        priority=row.priority,
        place=row.place,
        queued_at=row.queued_at,
        is_suspect=is_suspect(row.counted_attempts, row.lost_attempts),
        preemption_requested_at=row.preemption_requested_at,
        **{name: getattr(row, name) for name in NEEDS},
    )
