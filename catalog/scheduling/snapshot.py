"""What a decision is made from: the jobs that wait, what their projects have had, what a worker has free; and Policy,
the numbers of the rules."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from catalog.resources import pack_key as packing
from catalog.resources.memory import TICK_TOKENS, widens_tick
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
"""How long a job for another base may be passed over for the sake of a base that is loaded already."""
ADVANCE_SECONDS = 300.0
CLASS_STEP_SECONDS = 7200.0
URGENT_MULTIPLE = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The numbers of the rules: an operator's, the same in every process."""

    patience_seconds: float = PATIENCE_SECONDS
    half_life_seconds: float = HALF_LIFE_SECONDS
    """After so long, what a project has used counts half."""
    priority_aging_seconds: float = PROMOTE_AFTER_SECONDS
    """For each such time that a class has waited without its turn, its first job counts as a class higher."""
    advance_seconds: float = ADVANCE_SECONDS
    """Device-seconds that a job which goes before counts for, and a device that is held, beside what is charged: so
    that two workers who ask at once don't both serve one project."""
    class_step_seconds: float = CLASS_STEP_SECONDS
    """Between projects, each priority class is worth so many device-seconds for each unit of weight, and no more."""
    urgent_multiple: float = URGENT_MULTIPLE
    """A device-second of an urgent job is charged to its project as so many."""
    preempt_after_seconds: float = PREEMPT_AFTER_SECONDS
    """How long an urgent job waits before others are asked to leave for it."""
    spared_seconds: float = SPARED_SECONDS
    """Who trains for less is not asked to leave."""
    max_preemptions: int = MAX_PREEMPTIONS
    """Nor who has left so often; 0: nobody is."""
    ask_again_seconds: float = 120.0
    """So long a job waits for those who were asked before others are."""
    lease_seconds: float = LEASE_SECONDS
    """No more is charged at a time, for nobody trains longer without a heartbeat: a clock that jumps costs no more."""

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
        """What is added to a project's level to rank a job of this class among other projects' jobs: below 0 for
        `urgent`, above 0 for `batch`."""
        return (priority - PriorityClass.normal) * self.class_step_seconds

    def multiple(self, priority: int) -> float:
        """How many device-seconds are charged for each one that a job of this class trains."""
        return self.urgent_multiple if priority == PriorityClass.urgent else 1.0

    def awaits_preemption(self, preemption_requested_at: float | None, now: float) -> bool:
        """Whether it counts that others were asked then to leave for a job."""
        return preemption_requested_at is not None and now - preemption_requested_at < self.ask_again_seconds


USUAL = Policy()


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A queued job, as far as deciding needs it."""

    job_id: str
    project_id: str
    base_digest: str
    pack_key: str
    priority: int
    place: float
    """Among its project's jobs of its class."""
    queued_at: float
    """What its waiting is reckoned from."""
    own_bytes: int
    """What it takes wherever it trains: its row, and the mask of its dropout."""
    trainer_bytes: int
    """What a trainer of its base needs before its first job."""
    saved_bytes: int = 0
    """What it does without of that on a device that computes blocks again."""
    slice_bytes: int = 0
    """What it adds to a tick, beside other jobs, where the tick has not reached its size."""
    shardable_bytes: int = 0
    """What several devices can divide of what its trainer needs; 0: it needs the base whole."""
    gathered_bytes: int = 0
    """What each of them then needs beside its share."""
    is_suspect: bool = False
    """Trainers or workers have ended with it: it trains alone, so that no packmate is blamed or hurt."""
    preemption_requested_at: float | None = None
    """When others were last asked to leave for it; see Policy.awaits_preemption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unprepared:
    """A job whose files wait to be prepared: the first of its project and class."""

    job_id: str
    project_id: str
    priority: int
    created_at: float
    preparing_at: float
    """When its project last had files prepared; 0: never."""
    class_prepared_at: float = 0.0
    """When its project last had files of this class prepared; 0: never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What a project is due, and what it has had of late."""

    weight: float = 1.0
    device_seconds: float = 0.0
    """Charged so far, decayed to now. Those of urgent jobs count `Policy.urgent_multiple` times."""
    num_running: int = 0
    devices_in_use: float = 0.0
    """By its running jobs: of a device that several share each has its part, as it is charged."""

    def level(self, policy: Policy, *, num_before: float = 0) -> float:
        """Device-seconds for each unit of weight; the lowest goes first. num_before: its jobs that go before, or
        below 0 the devices that it would leave."""
        in_advance = (self.devices_in_use + num_before) * policy.advance_seconds
        return (self.device_seconds + in_advance) / self.weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a worker has free."""

    max_jobs: int
    """Jobs that it can take now."""
    memory_bytes_free: int
    """On the device. The base of an empty trainer is counted: a job needs it, or it is unloaded for another."""
    memory_bytes_when_empty: int | None = None
    """What would be free were its trainer gone. None: all that its worker has."""
    resident_key: str | None = None
    """Pack key of its trainer, if it has one. A trainer holds its base in one dtype and takes no job of another."""
    num_jobs: int = 0
    """Jobs that are in its trainer already."""
    tick_tokens: int = TICK_TOKENS["cpu"]
    """What a tick grows to on its device."""
    recomputes: bool = False
    """Whether its device computes blocks again where memory is short."""
    group: DeviceGroup = SINGLE
    holding: ShardingStrategy = "replicated"
    """How its trainer holds the base."""

    def own(self, job: Candidate) -> int:
        """Bytes that the job takes beside its part of a tick."""
        return job.own_bytes - (job.saved_bytes if self.recomputes else 0)

    def alone(self, job: Candidate) -> int:
        """Bytes that the job takes of each device with a trainer to itself."""
        return self.group.needed_bytes(self.demand(job))

    def demand(self, job: Candidate) -> Demand:
        return Demand(
            whole_bytes=job.trainer_bytes + self.own(job),
            shardable_bytes=job.shardable_bytes,
            gathered_bytes=job.gathered_bytes,
        )

    def holding_for(self, job: Candidate) -> ShardingStrategy:
        """How the base is held for it alone."""
        return self.group.holding(self.demand(job))

    def trains(self, job: Candidate, *, holding: ShardingStrategy) -> bool:
        """Whether a trainer that holds the base so trains the job as one for it alone would."""
        return self.holding_for(job) == holding and (job.shardable_bytes > 0 or holding == "replicated")

    def may_join(self, job: Candidate) -> bool:
        """Whether its trainer holds the base as it would for the job alone; how much is free is another matter."""
        return self.trains(job, holding=self.holding)

    def cost(self, job: Candidate, *, num_before: int) -> int:
        """Bytes of a job that joins `num_before` others: its row, and its slice while the tick still grows.

        The first job's slice is in what its trainer needs.
        """
        return self.own(job) + (job.slice_bytes if widens_tick(num_before, tick_tokens=self.tick_tokens) else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerService:
    """When a worker last gave each class of each project its turn."""

    at: Mapping[tuple[str, int], float]
    """By project and class: when the first of these jobs was claimed, of those that the worker holds."""
    memory_bytes: int
    recomputes: bool = False
    group: DeviceGroup = SINGLE
    can_load: Collection[str] | None = None
    """How it can hold a base; None: in every way."""

    def holds(self, job: Candidate) -> bool:
        """Whether the job could have had that turn. One that could not was passed over, and waits on."""
        is_loadable = self.can_load is None or packing.quantization_of(job.pack_key) in self.can_load
        return is_loadable and self.capacity.alone(job) <= self.memory_bytes

    @property
    def capacity(self) -> Capacity:
        """Of it, with nothing in it."""
        return Capacity(max_jobs=1, memory_bytes_free=self.memory_bytes, recomputes=self.recomputes, group=self.group)


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueSnapshot:
    """All that one decision looks at. Candidates stand in no order, and may stand there twice."""

    now: float
    candidates: tuple[Candidate, ...]
    shares: Mapping[str, Share]
    """By project, of all that wait; one that is not there has weight 1 and has had nothing."""
    served: Collection[WorkerService]
    """What each worker that lives has served."""
    capacity: Capacity
    live_key: str | None = None
    """Pack key of a trainer that has jobs and may take more; None: the decision is about a trainer's first jobs."""
    worker_bytes: int = 0
    """What could be held there, once the trainer has gone."""
    has_suspect: bool = False
    """A job in the live trainer is to train alone."""
    per_group: int | None = None
    """Of a project and class, the first so many that fit are here, or all; None: all are."""
    taken: Collection[str] = ()
    """Ids of candidates that others have taken since."""
