"""Selects the jobs that are preempted for an urgent job: a pure function of the queue and the workers' jobs.

Jobs are preempted only if that makes the urgent job fit. A job that has just started, was preempted too often or counts
as urgent itself is never preempted. A job of another project is preempted only if it would be behind the urgent job in
the queue. A worker that could hold a job of another project that is ahead preempts nothing. Preemption therefore does
not change fair share.
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
"""Maximum number of urgent jobs of a project that are considered, and for which jobs are preempted, at one time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """A job in a trainer."""

    job_id: str
    claim_id: str
    project_id: str
    effective_priority: int
    """The class with which it started: its own, or a higher one because of priority aging."""
    effective_level: float
    """The `effective_level` that it would have if it and its project's other jobs on the worker were queued."""
    own_bytes: int
    """Bytes that are free without it, including its part of a tick."""
    began_at: float
    num_packmates: int
    """Jobs of its trainer, including itself."""
    num_preemptions: int = 0
    is_leaving: bool = False
    """Whether it was already asked to leave: cancelled, paused or preempted."""
    seconds_left: float | None = None
    """Time until it finishes, if known."""

    def at_stake(self, now: float) -> float:
        """Return the device-seconds of this attempt: the most that is lost if its checkpoint is not written."""
        return max(0.0, now - self.began_at) / max(1, self.num_packmates)


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """A worker with a trainer."""

    worker_id: str
    pack_key: str
    service: WorkerService
    """The jobs that the worker could hold."""
    jobs: tuple[Training, ...]
    memory_bytes_free: int = 0
    """Free memory next to its jobs, as last reported."""
    places: int = 0
    """Number of jobs that could join now, as last reported."""
    has_suspect: bool = False
    """Whether a job in the trainer is isolated, so that no other job may join."""
    holding: ShardingStrategy = "replicated"
    """How its trainer holds the base model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preemption:
    """The jobs to preempt on one worker; none if the worker will have enough memory without preemption."""

    worker_id: str
    victims: tuple[Training, ...]
    makes: str
    """`a place`: the urgent job joins the jobs that stay. `a trainer`: all jobs leave, and a new trainer starts."""
    device_seconds: float
    """Device-seconds at stake, of all victims."""


def pressing(entries: Iterable[QueueEntry], *, now: float, policy: Policy) -> list[tuple[QueueEntry, list[Candidate]]]:
    """Return the urgent jobs for which other jobs may be preempted now, in queue order.

    Such a job has waited for `preempt_after_seconds`, and no preemption for it is in progress. Each comes with the jobs
    of other projects that are ahead of it and not urgent, for which no job is preempted.
    """
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
    """Return the effective level that a training job would have if it and the jobs that leave with it were queued."""
    return share.level(policy, num_before=-devices_left) + policy.handicap(priority)


def choose(
    entry: QueueEntry, holders: Iterable[Holder], *, ahead: Collection[Candidate] = (), now: float, policy: Policy
) -> Preemption | None:
    """Return the jobs to preempt for the urgent job of `entry`; None if no preemption makes it fit.

    `ahead`: jobs of other projects ahead of it. No job is preempted on a worker that could hold one of them. Among the
    other workers, the one is chosen whose highest-priority victim has the lowest priority; ties go to the fewest
    device-seconds at stake.
    """
    able = (holder for holder in holders if not any(holder.service.holds(other) for other in ahead))
    found = [option for holder in able if (option := _on_worker(holder, entry, now=now, policy=policy)) is not None]
    return min(found, key=_price, default=None)


def preemption_record(job: Candidate, preemption: Preemption, victim: Training, *, now: float, policy: Policy) -> Json:
    """Return the inputs of the decision, for the victim's attempt and for explanations.

    They do not name the urgent job, which may belong to another project.
    """
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


def _on_worker(holder: Holder, entry: QueueEntry, *, now: float, policy: Policy) -> Preemption | None:
    job = entry.candidate
    if not holder.service.holds(job):
        return None
    staying = [each for each in holder.jobs if not _leaves_soon(each, policy)]
    is_alike = holder.pack_key == job.pack_key and holder.service.capacity.trains(job, holding=holder.holding)
    may_join = is_alike and not job.is_suspect and not holder.has_suspect
    joining = _to_join(holder, entry, staying, now=now, policy=policy) if may_join else None
    if joining is not None:
        return joining
    victims = tuple(each for each in staying if _may_preempt(each, entry, now=now, policy=policy))
    return _preemption(holder, victims, "a trainer", now=now) if len(victims) == len(staying) else None


def _to_join(
    holder: Holder, entry: QueueEntry, staying: list[Training], *, now: float, policy: Policy
) -> Preemption | None:
    """Return the cheapest jobs to preempt so that the urgent job can join those that stay; None if that is impossible.

    Victims are added from the cheapest on until the urgent job fits, and those that are not needed are then removed.
    """
    job, gone = entry.candidate, [each for each in holder.jobs if each not in staying]
    missing = (
        holder.service.capacity.own(job)
        + job.slice_bytes
        - holder.memory_bytes_free
        - sum(each.own_bytes for each in gone)
    )
    is_full = not holder.places and not gone

    def suffice(victims: list[Training]) -> bool:
        return sum(each.own_bytes for each in victims) >= missing and bool(victims or not is_full)

    victims: list[Training] = []
    for each in sorted(staying, key=lambda each: _cost(each, now)):
        if suffice(victims):
            break
        if _may_preempt(each, entry, now=now, policy=policy):
            victims.append(each)
    if not suffice(victims):
        return None
    for each in sorted(victims, key=lambda each: _cost(each, now), reverse=True):
        fewer = [other for other in victims if other is not each]
        victims = fewer if suffice(fewer) else victims
    return _preemption(holder, tuple(victims), "a place", now=now)


def _preemption(holder: Holder, victims: tuple[Training, ...], makes: str, *, now: float) -> Preemption:
    device_seconds = sum(victim.at_stake(now) for victim in victims)
    return Preemption(worker_id=holder.worker_id, victims=victims, makes=makes, device_seconds=device_seconds)


def _price(option: Preemption) -> tuple[int, float, int, str]:
    highest = min((victim.effective_priority for victim in option.victims), default=999)
    return -highest, option.device_seconds, len(option.victims), option.worker_id


def _cost(job: Training, now: float) -> tuple[int, float, str]:
    return -job.effective_priority, job.at_stake(now), job.job_id


def _leaves_soon(job: Training, policy: Policy) -> bool:
    """Return whether the job leaves soon enough without preemption."""
    return job.is_leaving or (job.seconds_left is not None and job.seconds_left <= policy.preempt_after_seconds)


def _may_preempt(victim: Training, entry: QueueEntry, *, now: float, policy: Policy) -> bool:
    job = entry.candidate
    is_own = victim.project_id == job.project_id
    is_lower = victim.effective_priority > job.priority and (is_own or victim.effective_level > entry.effective_level)
    has_run_long_enough = now - victim.began_at >= policy.spared_seconds
    return is_lower and has_run_long_enough and victim.num_preemptions < policy.max_preemptions
