"""Which jobs leave so that an urgent job can train: a pure function of the queue and of what each worker holds.

No job leaves for less than room for that job, or if it has just begun, has left too often or counts as urgent itself. A
job of another project leaves only where it would stand behind the urgent job in the queue, and no worker makes room
before the jobs of other projects that stand ahead: so fair share holds whatever is preempted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from catalog.resources.sharding import ShardingStrategy
from catalog.scheduling.ordering import QueueEntry
from catalog.scheduling.snapshot import Candidate, Policy, Share, WorkerService
from catalog.states import PriorityClass

Json = dict[str, Any]

AT_ONCE = 8
"""Urgent jobs of a project that are looked at, and for which room is made in one look."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """A job that a trainer holds."""

    job_id: str
    project_id: str
    effective_priority: int
    """The class in which it was let in: its own, or a higher one, for which the waiting of its class was counted."""
    effective_level: float
    """As of a turn: what it would have if it waited, and its project's other jobs on the worker too."""
    own_bytes: int
    """That are free without it, its part of a tick among them."""
    began_at: float
    num_beside: int
    """Jobs of its trainer, itself among them."""
    num_preemptions: int = 0
    is_leaving: bool = False
    """Somebody has asked for it already."""
    seconds_left: float | None = None
    """Until it ends by itself, where that is known."""

    def at_stake(self, now: float) -> float:
        """Device-seconds of this attempt: the most that could be lost, were its checkpoint not written."""
        return max(0.0, now - self.began_at) / max(1, self.num_beside)


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """A worker with a trainer."""

    worker_id: str
    pack_key: str
    service: WorkerService
    """What it could hold."""
    jobs: tuple[Training, ...]
    memory_bytes_free: int = 0
    """As the worker last said; beside what it holds."""
    places: int = 0
    """Jobs that it would let join now, as it last said."""
    has_suspect: bool = False
    """Nobody may join it."""
    holding: ShardingStrategy = "replicated"
    """Its trainer holds a share of the base on each device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preemption:
    """Those who leave one worker; none where room comes by itself."""

    worker_id: str
    victims: tuple[Training, ...]
    makes: str
    """a place: beside those that stay. a trainer: all leave, for another base."""
    device_seconds: float
    """At stake, of all of them."""


def pressing(entries: Iterable[QueueEntry], *, now: float, policy: Policy) -> list[tuple[QueueEntry, list[Candidate]]]:
    """Urgent jobs that have waited for long enough and for which no room is being made, first turn first; and the jobs
    of other projects ahead of each that can't have room made for them, since they are not urgent."""
    found: list[tuple[QueueEntry, list[Candidate]]] = []
    before: list[Candidate] = []
    for entry in entries:
        job = entry.candidate
        if job.priority != PriorityClass.urgent:
            before.append(job)
        elif now - job.queued_at >= policy.preempt_after_seconds and not entry.awaits_preemption:
            found.append((entry, [other for other in before if other.project_id != job.project_id]))
    return found


def level_if_it_left(share: Share, *, priority: int, devices_left: float, policy: Policy) -> float:
    """The effective level of a job that trains if it and those that leave with it waited; see Training."""
    return share.level(policy, num_before=-devices_left) + policy.handicap(priority)


def choose(
    entry: QueueEntry, holders: Iterable[Holder], *, ahead: Collection[Candidate] = (), now: float, policy: Policy
) -> Preemption | None:
    """Which jobs leave for the urgent job of `entry`; None where that would not help.

    ahead: jobs of other projects that go before it: no room is made on a worker that could hold one of them. Among
    workers, where the highest of those who leave stands lowest; then where least is at stake.
    """
    able = (holder for holder in holders if not any(holder.service.holds(other) for other in ahead))
    found = [option for holder in able if (option := _at(holder, entry, now=now, policy=policy)) is not None]
    return min(found, key=_price, default=None)


def preemption_record(job: Candidate, preemption: Preemption, victim: Training, *, now: float, policy: Policy) -> Json:
    """For the victim's record, and for who asks. The job for which it leaves may be another project's: no name."""
    return {
        "as_of": now,
        "for_class": job.priority,
        "for_waited_seconds": round(now - job.queued_at, 1),
        "makes": preemption.makes,
        "num_leaving": len(preemption.victims),
        "effective_priority": victim.effective_priority,
        "trained_seconds": round(now - victim.began_at, 1),
        "device_seconds_at_stake": round(victim.at_stake(now), 1),
        "num_preemptions_before": victim.num_preemptions,
        "policy": {
            "preempt_after_seconds": policy.preempt_after_seconds,
            "spared_seconds": policy.spared_seconds,
            "max_preemptions": policy.max_preemptions,
        },
    }


def _at(holder: Holder, entry: QueueEntry, *, now: float, policy: Policy) -> Preemption | None:
    job = entry.candidate
    if not holder.service.holds(job):
        return None
    staying = [each for each in holder.jobs if not _leaves_by_itself(each, policy)]
    is_alike = holder.pack_key == job.pack_key and holder.service.capacity.trains(job, holding=holder.holding)
    may_join = is_alike and not job.is_suspect and not holder.has_suspect
    beside = _beside(holder, entry, staying, now=now, policy=policy) if may_join else None
    if beside is not None:
        return beside
    victims = tuple(each for each in staying if _may_go(each, entry, now=now, policy=policy))
    return _of(holder, victims, "a trainer", now=now) if len(victims) == len(staying) else None


def _beside(
    holder: Holder, entry: QueueEntry, staying: list[Training], *, now: float, policy: Policy
) -> Preemption | None:
    """The cheapest first, until there is room; then without those that turned out to be needless."""
    job, gone = entry.candidate, [each for each in holder.jobs if each not in staying]
    missing = (
        holder.service.capacity.own(job)
        + job.slice_bytes
        - holder.memory_bytes_free
        - sum(each.own_bytes for each in gone)
    )
    lacks_place = not holder.places and not gone

    def suffice(victims: list[Training]) -> bool:
        return sum(each.own_bytes for each in victims) >= missing and bool(victims or not lacks_place)

    victims: list[Training] = []
    for each in sorted(staying, key=lambda each: _dearness(each, now)):
        if suffice(victims):
            break
        if _may_go(each, entry, now=now, policy=policy):
            victims.append(each)
    if not suffice(victims):
        return None
    for each in sorted(victims, key=lambda each: _dearness(each, now), reverse=True):
        fewer = [other for other in victims if other is not each]
        victims = fewer if suffice(fewer) else victims
    return _of(holder, tuple(victims), "a place", now=now)


def _of(holder: Holder, victims: tuple[Training, ...], makes: str, *, now: float) -> Preemption:
    stake = sum(victim.at_stake(now) for victim in victims)
    return Preemption(worker_id=holder.worker_id, victims=victims, makes=makes, device_seconds=stake)


def _price(option: Preemption) -> tuple[int, float, int, str]:
    highest = min((victim.effective_priority for victim in option.victims), default=999)
    return -highest, option.device_seconds, len(option.victims), option.worker_id


def _dearness(job: Training, now: float) -> tuple[int, float, str]:
    return -job.effective_priority, job.at_stake(now), job.job_id


def _leaves_by_itself(job: Training, policy: Policy) -> bool:
    """Soon enough to be waited for."""
    return job.is_leaving or (job.seconds_left is not None and job.seconds_left <= policy.preempt_after_seconds)


def _may_go(victim: Training, entry: QueueEntry, *, now: float, policy: Policy) -> bool:
    job = entry.candidate
    is_own = victim.project_id == job.project_id
    is_lower = victim.effective_priority > job.priority and (is_own or victim.effective_level > entry.effective_level)
    has_had_time = now - victim.began_at >= policy.spared_seconds
    return is_lower and has_had_time and victim.num_preemptions < policy.max_preemptions
