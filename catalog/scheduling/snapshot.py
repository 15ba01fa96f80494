"""Inputs of a scheduling decision: queued jobs, usage of their projects, free capacity of a worker; and the Policy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from catalog.resources.memory import TICK_TOKENS, widens_tick
from catalog.resources.pack_key import quantization_of
from catalog.resources.sharding import SINGLE, Demand, DeviceGroup, ShardingStrategy
from catalog.settings import (
    HALF_LIFE_SECONDS,
    LEASE_SECONDS,
    MAX_PREEMPTIONS,
    PREEMPT_AFTER_SECONDS,
    PROMOTE_AFTER_SECONDS,
    SPARED_SECONDS,
    Settings,
)
from catalog.states import PriorityClass

PATIENCE_SECONDS = 60.0
"""How long jobs for the loaded base model may be preferred to a job for another base model."""
ADVANCE_SECONDS = 300.0
CLASS_STEP_SECONDS = 7200.0
URGENT_MULTIPLE = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The parameters of the scheduling rules, set by the operator and equal in every process."""

    patience_seconds: float = PATIENCE_SECONDS
    half_life_seconds: float = HALF_LIFE_SECONDS
    """Half-life of the recorded usage of a project."""
    priority_aging_seconds: float = PROMOTE_AFTER_SECONDS
    """Priority aging: the first job of a class is promoted one class each time the class waits this long unserved."""
    advance_seconds: float = ADVANCE_SECONDS
    """Device-seconds that are added to a project's usage for each of its jobs ahead in the queue, and for each device
    in use, so that two workers that poll at the same time don't both serve one project."""
    class_step_seconds: float = CLASS_STEP_SECONDS
    """Value of one priority class between projects, in device-seconds per unit of weight."""
    urgent_multiple: float = URGENT_MULTIPLE
    """Charged device-seconds for each device-second of an urgent job."""
    preempt_after_seconds: float = PREEMPT_AFTER_SECONDS
    """How long an urgent job waits before other jobs are preempted for it."""
    spared_seconds: float = SPARED_SECONDS
    """A job that has trained for less time is not preempted."""
    max_preemptions: int = MAX_PREEMPTIONS
    """A job that was preempted this often is not preempted again; 0: no job is preempted."""
    ask_again_seconds: float = 120.0
    """How long a job waits for preempted jobs to leave before more jobs are preempted for it."""
    lease_seconds: float = LEASE_SECONDS
    """The longest time that is charged at once. No job trains longer without a heartbeat, so a clock that jumps can't
    cost more."""

    @classmethod
    def of(cls, settings: Settings) -> Policy:
        return cls(
            half_life_seconds=settings.share_half_life_seconds,
            priority_aging_seconds=settings.priority_aging_seconds,
            preempt_after_seconds=settings.preempt_after_seconds,
            spared_seconds=settings.preemption_min_runtime_seconds,
            max_preemptions=settings.max_preemptions,
            lease_seconds=settings.lease_seconds,
        )

    def handicap(self, priority: int) -> float:
        """Return the amount that is added to a project's level to rank a job of this class among other projects' jobs:
        below 0 for `urgent`, above 0 for `batch`."""
        return (priority - PriorityClass.normal) * self.class_step_seconds

    def multiple(self, priority: int) -> float:
        """Return the charged device-seconds for each device-second of a job of this class."""
        return self.urgent_multiple if priority == PriorityClass.urgent else 1.0

    def awaits_preemption(self, preemption_requested_at: float | None, now: float) -> bool:
        """Return whether a job still waits for the jobs that were preempted for it at that time."""
        return preemption_requested_at is not None and now - preemption_requested_at < self.ask_again_seconds


USUAL = Policy()


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """The scheduling-relevant fields of a queued job."""

    job_id: str
    project_id: str
    base_digest: str
    pack_key: str
    priority: int
    place: float
    """Sort key among its project's jobs of the same class."""
    queued_at: float
    """Start of its waiting time."""
    own_bytes: int
    """This and the next five: see `requirements.MemoryRequirements`."""
    trainer_bytes: int
    saved_bytes: int = 0
    slice_bytes: int = 0
    shardable_bytes: int = 0
    gathered_bytes: int = 0
    is_suspect: bool = False
    """Whether trainers or workers have failed with this job. It then trains alone, so that it affects no packmate."""
    preemption_requested_at: float | None = None
    """When other jobs were last preempted for it; see Policy.awaits_preemption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The fair-share weight of a project and its recent usage."""

    weight: float = 1.0
    device_seconds: float = 0.0
    """Charged usage, decayed to now. Device-seconds of urgent jobs count `Policy.urgent_multiple` times."""
    num_running: int = 0
    devices_in_use: float = 0.0
    """Devices of its running jobs. Jobs that share a device count as fractions of it, as for charges."""

    def level(self, policy: Policy, *, num_before: float = 0) -> float:
        """Return the normalized usage: device-seconds per unit of weight. The lowest is scheduled first.

        `num_before`: jobs of the project that are ahead; a negative number stands for devices that it would release.
        """
        in_advance = (self.devices_in_use + num_before) * policy.advance_seconds
        return (self.device_seconds + in_advance) / self.weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """The free capacity of a worker."""

    max_jobs: int
    """Number of jobs that it can start now."""
    memory_bytes_free: int
    """Free memory of the device. The base model of an empty trainer counts as free: a job uses it or it is unloaded."""
    memory_bytes_when_empty: int | None = None
    """Free memory without its trainer. None: the total memory of the worker."""
    resident_key: str | None = None
    """Pack key of its trainer, if it has one. The trainer accepts no job with another key."""
    num_jobs: int = 0
    """Number of jobs in its trainer."""
    tick_tokens: int = TICK_TOKENS["cpu"]
    """Maximum tokens of a tick on its device."""
    slice_bytes: int = 0
    """Memory by which a job widens the ticks of its trainer, if that is more than the job's requirements assume."""
    recomputes: bool = False
    """Whether its device uses activation recomputation when memory is short."""
    group: DeviceGroup = SINGLE
    holding: ShardingStrategy = "replicated"
    """How its trainer holds the base model."""

    def own(self, job: Candidate) -> int:
        """Return the bytes of the job itself, without its part of a tick."""
        return job.own_bytes - (job.saved_bytes if self.recomputes else 0)

    def alone(self, job: Candidate) -> int:
        """Return the bytes of each device that the job needs alone in a trainer."""
        return self.group.needed_bytes(self.demand(job))

    def demand(self, job: Candidate) -> Demand:
        return Demand(
            whole_bytes=job.trainer_bytes + self.own(job),
            shardable_bytes=job.shardable_bytes,
            gathered_bytes=job.gathered_bytes,
        )

    def holding_for(self, job: Candidate) -> ShardingStrategy:
        """Return how the group holds the base model if the job trains alone."""
        return self.group.holding(self.demand(job))

    def trains(self, job: Candidate, *, holding: ShardingStrategy) -> bool:
        """Return whether a trainer with this `holding` trains the job in the same way as a trainer for it alone."""
        return self.holding_for(job) == holding and (job.shardable_bytes > 0 or holding == "replicated")

    def may_join(self, job: Candidate) -> bool:
        """Return whether its trainer holds the base model as for the job alone. Free memory is not checked."""
        return self.trains(job, holding=self.holding)

    def cost(self, job: Candidate, *, num_before: int) -> int:
        """Return the bytes of a job that joins `num_before` others: its own, and its slice while the tick can grow.

        The slice of the first job is part of `trainer_bytes`.
        """
        slice_bytes = max(job.slice_bytes, self.slice_bytes)  # `own` counts a long slice beyond the job's value
        return self.own(job) + (slice_bytes if widens_tick(num_before, tick_tokens=self.tick_tokens) else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerService:
    """When a worker last served each class of each project, and which jobs it can hold."""

    at: Mapping[tuple[str, int], float]
    """By project and class: when the worker last claimed the first of these jobs that it can hold."""
    memory_bytes: int
    recomputes: bool = False
    group: DeviceGroup = SINGLE
    can_load: Collection[str] | None = None
    """Quantizations that it can load; None: all."""

    def holds(self, job: Candidate) -> bool:
        """Return whether the worker can hold the job when empty. A job that it can't hold is skipped there."""
        is_loadable = self.can_load is None or quantization_of(job.pack_key) in self.can_load
        return is_loadable and self.capacity.alone(job) <= self.memory_bytes

    @property
    def capacity(self) -> Capacity:
        """The capacity of the worker when empty."""
        return Capacity(max_jobs=1, memory_bytes_free=self.memory_bytes, recomputes=self.recomputes, group=self.group)


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueSnapshot:
    """All inputs of one decision. Candidates are in no order, and may occur twice."""

    now: float
    candidates: tuple[Candidate, ...]
    shares: Mapping[str, Share]
    """By project, for all projects with queued jobs. A project that is missing has weight 1 and no usage."""
    served: Collection[WorkerService]
    """One entry for each live worker."""
    capacity: Capacity
    live_key: str | None = None
    """Pack key of a trainer that has jobs and may accept more; None: the decision is about a trainer's first jobs."""
    worker_bytes: int = 0
    """Memory of the worker once the trainer has exited."""
    has_suspect: bool = False
    """Whether a job in the live trainer must train alone."""
