"""Computes the results of a plan: reads the inputs from the database, and delegates the estimates to other modules.

The job is represented by a row that is never stored, so that its estimates use the same code as those of real jobs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from catalog.admission.accept import Accepted
from catalog.error_texts import ErrorText
from catalog.fleet import gangs, views
from catalog.plans import duration
from catalog.plans.duration import ExpectedStart, Measured, Occupied, Overheads, Runner
from catalog.queue import charging, listing
from catalog.resources import requirements, sharding
from catalog.resources.memory import JOB_TOKENS
from catalog.resources.pack_key import quantization_of
from catalog.resources.sharding import NEVER, Demand, DeviceGroup, MemoryBreakdown
from catalog.resources.throughput import Speeds
from catalog.scheduling.ordering import order
from catalog.scheduling.snapshot import Candidate, Policy, Share
from catalog.serving import servability
from catalog.settings import Settings
from catalog.spec import job_warnings
from catalog.spec.job import AUTO_LENGTH, MAX_LENGTH, JobSpec
from catalog.spec.target_modules import Adapted
from catalog.states import EndReason, JobState, PriorityClass
from catalog.tables.fleet import Trainer, Worker, is_live
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from catalog.tables.storage import BaseModelRow
from catalog.tables.table import Json
from catalog.tables.tenancy import Project

NUM_RECENT = 20
"""Number of the project's last succeeded jobs, per class, from which a typical training time is estimated."""
NUM_TRAINERS = 5
"""Number of latest trainers of a pack key whose measured speeds are used."""
CORES = re.compile(r"CPU, (\d+) cores")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedData:
    """Reports of the preparation of the files."""

    training: Json
    validation: Json | None
    overlap: tuple[int, int] | None
    """(rows of the validation file that the training file contains too, all rows of the validation file)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """The memory needs of a job in bytes."""

    parts: dict[str, dict[str, int]]
    """Bytes by purpose, by kind of device, with a replicated base model."""
    shardable_bytes: int
    gathered_bytes: int
    hindrance: str | None
    """Reason why the base model can't be sharded for the job, or None."""

    def total(self, kind: str) -> int:
        return sharding.total(self.parts[kind], kind=kind)

    def demand(self, kind: str) -> Demand:
        return Demand(
            whole_bytes=sum(self.parts[kind].values()),
            shardable_bytes=self.shardable_bytes,
            gathered_bytes=self.gathered_bytes,
        )

    def on(self, group: DeviceGroup) -> dict[str, int]:
        """The bytes by purpose on each device of a group that shards the base model."""
        whole, demand = self.parts[group.kind], self.demand(group.kind)
        held = {"undivided": whole["base"] - self.shardable_bytes}
        held |= group.block_parts(demand, group.holding(demand))
        return held | {name: num_bytes for name, num_bytes in whole.items() if name != "base"}


def estimate_plan(
    session: Session,
    job: Job,
    accepted: Accepted,
    data: TokenizedData,
    *,
    targets: list[Adapted],
    now: float,
    settings: Settings,
) -> Json:
    """Return the results of the plan.

    job: a row from `accept.job_row`, in no session. targets: the layers that the job adapts.
    """
    spec, description = accepted.spec, accepted.base.description or {}
    num_steps = spec.num_steps(int(data.training["usable_rows"]))
    found = [int(report.get("longest_example") or 0) for report in (data.training, data.validation) if report]
    job.longest_example = max(found) or None
    sizes, live = _sizes(job, description), _live(session, job, now=now)
    groups = _groups(session, live, now=now)
    fitting = _fitting(live, groups, sizes)
    servable = servability.of_job(
        spec, [target.rank for target in targets], architecture=description.get("architecture")
    )
    cautions = [*accepted.cautions, *_cautions(accepted, data, targets, job=job, num_steps=num_steps)]
    if live and not fitting:
        cautions.append(_fits_nowhere(groups, sizes, spec))
    return {
        "computed_at": now,
        "data": {
            "training": data.training,
            "validation": data.validation,
            "overlap": dict(zip(("rows", "of_rows"), data.overlap, strict=True)) if data.overlap else None,
        },
        "num_steps": num_steps,
        "trainable_parameters": job.adapter_parameters,
        "adapted_layers": len(targets),
        "memory": [*(_memory(sizes, kind) for kind in ("cuda", "cpu")), *_memory_of_groups(sizes, groups)],
        "devices": _devices(sizes, groups, fitting),
        "training_time": asdict(_training_time(session, job, accepted, data, fitting, num_steps=num_steps, now=now)),
        "expected_start": asdict(_expected_start(session, job, live, fitting, now=now, settings=settings)),
        "servable": {server: asdict(answer) for server, answer in servable.items()},
        "warnings": [asdict(caution) for caution in cautions],
    }


def _cautions(
    accepted: Accepted, data: TokenizedData, targets: list[Adapted], *, job: Job, num_steps: int
) -> Iterator[ErrorText]:
    spec = accepted.spec
    most_tokens = min((accepted.base.description or {}).get("max_positions") or AUTO_LENGTH, MAX_LENGTH)
    yield from job_warnings.of_course(
        spec,
        num_steps=num_steps,
        has_held_out=data.validation is not None,
        usable_rows=int(data.training["usable_rows"]),
    )
    yield from job_warnings.of_data(spec, data.training, role="training", most_tokens=most_tokens)
    if data.validation is not None:
        yield from job_warnings.of_data(spec, data.validation, role="validation", most_tokens=most_tokens)
    is_one_file = any(each.code == "validation_is_training" for each in accepted.cautions)
    if data.overlap is not None and not is_one_file:
        overlap = job_warnings.of_overlap(data.overlap[0], of_rows=data.overlap[1])
        if overlap is not None:
            yield overlap
    yield from job_warnings.of_rank(
        spec,
        targets,
        num_parameters=job.adapter_parameters,
        supervised_tokens=int(data.training["supervised_tokens"]),
    )


def _sizes(job: Job, description: Json) -> _Sizes:
    base = requirements.base_memory(job, description)
    shared = {"base": base.weight_bytes(), **base.tick_parts(JOB_TOKENS)}
    divisible, gathered = requirements.shardable_bytes(job, description)
    return _Sizes(
        parts={kind: shared | requirements.own_parts(job, base, recomputes=kind == "cuda") for kind in ("cuda", "cpu")},
        shardable_bytes=divisible,
        gathered_bytes=gathered,
        hindrance=sharding.hindrance(job.spec["lora"], base.quantization, description),
    )


def _memory(sizes: _Sizes, kind: str) -> Json:
    parts = _listed(sizes.parts[kind])
    if kind == "cuda":
        description = "CUDA context (approximate)"
        parts.append({"part": "cuda", "bytes": sharding.CUDA_BYTES, "description": description})
    one = {"num_devices": 1, "strategy": "replicated"}
    return {"kind": kind, **one, "total_bytes": sizes.total(kind), "parts": parts}


def _memory_of_groups(sizes: _Sizes, groups: Mapping[str, DeviceGroup]) -> list[Json]:
    """The memory needs per device for groups that would shard the base model. Lists each kind of group once."""
    found: dict[tuple[str, int, str], Json] = {}
    for group in dict.fromkeys(groups.values()):
        demand = sizes.demand(group.kind)
        holding, needed = group.holding(demand), group.needed_bytes(demand)
        if holding == "replicated" or needed == NEVER:
            continue
        parts = _listed(sizes.on(group))
        if group.reserve_bytes:
            description = "CUDA context and communication buffers (approximate)"
            parts.append({"part": "cuda", "bytes": group.reserve_bytes, "description": description})
        about = (group.kind, group.num_devices, group.strategy(demand))
        key_fields = dict(zip(("kind", "num_devices", "strategy"), about, strict=True))
        of_host = demand.shardable_bytes if holding == "offloaded" and not group.keeps_shares else 0
        found[about] = {**key_fields, "total_bytes": needed, "host_bytes": of_host, "parts": parts}
    return list(found.values())


def _listed(parts: dict[str, int]) -> list[Json]:
    return [
        {"part": name, "bytes": num_bytes, "description": description}
        for name, num_bytes, description in sharding.listed(parts)
    ]


def _live(session: Session, job: Job, *, now: float) -> list[Worker]:
    """Live workers that accept jobs and support the base model's quantization.

    Excludes gang members that do not lead, because they claim no jobs.
    """
    quantization = quantization_of(job.pack_key)
    lenders = gangs.lending_workers(gangs.gang_views(session, now=now))
    live = session.scalars(select(Worker).where(is_live(now=now)).order_by(Worker.id))
    able = [row for row in live if not row.takes_nothing_new and quantization in row.quantizations]
    return [row for row in able if row.id not in lenders]


def _groups(session: Session, live: Sequence[Worker], *, now: float) -> dict[str, DeviceGroup]:
    """The device group of each worker, with the memory of the smallest worker of its gang."""
    smallest = gangs.smallest_members(session, now=now)
    return {row.id: views.empty_capacity(row, smallest.get(row.id)).group for row in live}


def _fitting(live: Sequence[Worker], groups: Mapping[str, DeviceGroup], sizes: _Sizes) -> list[Worker]:
    """The workers that can train the job, smallest first."""
    held = {row.id: row for row in live}
    fit = sharding.that_fit([_breakdown(row, groups[row.id], sizes) for row in live])
    return [held[device.worker_id] for device in fit]


def _breakdown(row: Worker, group: DeviceGroup, sizes: _Sizes) -> MemoryBreakdown:
    demand = sizes.demand(group.kind)
    return MemoryBreakdown(
        worker_id=row.id,
        name=_device(row),
        kind=group.kind,
        memory_bytes=group.bytes_of_each,
        num_devices=group.num_devices,
        strategy=group.strategy(demand),
        needed_bytes=group.needed_bytes(demand),
    )


def _device(row: Worker) -> str:
    return str(next((device.get("name") for device in row.devices if device.get("name")), "a device"))


def _fits_nowhere(groups: Mapping[str, DeviceGroup], sizes: _Sizes, spec: JobSpec) -> ErrorText:
    found = [(group, sizes.demand(group.kind)) for group in groups.values()]
    message = sharding.explain_misfit(found, sizes.hindrance)
    assert message is not None, "the caller has checked that no worker fits"
    would_fit = sharding.would_fit(sizes.demand("cuda"))
    fits = sharding.would_fit_sentence(would_fit)
    less = "with_less"
    if spec.parent is not None:  # the job inherits its rank and its quantization
        less = "without_parent"
    elif spec.quantization != "none" or spec.lora.use_dora or spec.lora.begins_with_the_base:
        less = "with_lower_rank"
    name = f"fits_larger_worker_or_{less}" if would_fit else f"fits_no_worker_but_{less}"
    return ErrorText.of(name, explanation=message, fits=fits)


def _devices(sizes: _Sizes, groups: Mapping[str, DeviceGroup], fitting: Sequence[Worker]) -> Json:
    card = sharding.smallest_card(sizes.total("cuda"))
    of_several = [fit for fit in sharding.would_fit(sizes.demand("cuda")) if fit.num_devices > 1]
    return {
        "smallest_gpu": asdict(card) if card else None,
        "groups": [
            {"num_devices": fit.num_devices, "host_bytes": fit.host_bytes, **asdict(fit.card)} for fit in of_several
        ],
        "workers_that_fit": [asdict(_breakdown(row, groups[row.id], sizes)) for row in fitting],
        "live_workers": len(groups),
    }


def _training_time(
    session: Session,
    job: Job,
    accepted: Accepted,
    data: TokenizedData,
    fitting: Sequence[Worker],
    *,
    num_steps: int,
    now: float,
) -> duration.Estimate:
    work = duration.work_of(
        accepted.spec,
        num_steps=num_steps,
        tokens=int(data.training["tokens"]),
        usable_rows=int(data.training["usable_rows"]),
        valid_tokens=int(data.validation["tokens"]) if data.validation else None,
        num_parameters=int((accepted.base.description or {}).get("num_parameters", 0)),
    )
    latest = select(Trainer).where(Trainer.pack_key == job.pack_key).order_by(Trainer.started_at.desc())
    trainers = session.scalars(latest.limit(NUM_TRAINERS)).all()
    same = _measured(session, trainers)
    around = _overheads(session, trainers)
    return duration.training_time(work, [_runner(session, row, same, around, job.pack_key) for row in fitting])


def _runner(
    session: Session, row: Worker, same: dict[str, Measured], around: dict[str, Overheads], pack_key: str
) -> Runner:
    """The worker with its measured speeds. Its live trainer takes precedence over earlier trainers."""
    cores = CORES.search(_device(row))
    own = _of_live_trainer(session, row)
    is_same = own is not None and own[0] == pack_key
    found = around.get(row.id) or around.get(_device(row)) or Overheads()
    return Runner(
        worker_id=row.id,
        device=_device(row),
        kind="cuda" if row.has_gpu else "cpu",
        num_cores=int(cores[1]) if cores else None,
        same=own[1] if own is not None and is_same else same.get(row.id) or same.get(_device(row)),
        other=own[1] if own is not None and not is_same else None,
        overheads=replace(found, load_seconds=0.0) if is_same else found,
    )


def _of_live_trainer(session: Session, row: Worker) -> tuple[str, Measured] | None:
    """(pack key, measured speeds) of the worker's live trainer."""
    trainer = session.get(Trainer, row.trainer_id) if row.trainer_id else None
    speeds = (row.report or {}).get("tick_speeds")
    if trainer is None or not speeds:
        return None
    measured = _as_measured(session, row.id, trainer, speeds)
    return (trainer.pack_key, measured) if measured else None


def _measured(session: Session, trainers: Sequence[Trainer]) -> dict[str, Measured]:
    """The final speeds of trainers, by worker id and by device name. The first trainer of a name counts."""
    found: dict[str, Measured] = {}
    for trainer in trainers:
        speeds = (trainer.report or {}).get("tick_speeds")
        measured = _as_measured(session, trainer.worker_id, trainer, speeds) if speeds else None
        if measured is None:
            continue
        for name in _names(session, trainer):
            found.setdefault(name, measured)
    return found


def _overheads(session: Session, trainers: Sequence[Trainer]) -> dict[str, Overheads]:
    """The times that the jobs of trainers took around their training, by worker id and by device name.

    Only the first job of a trainer waits until the base model is loaded.
    """
    loads: dict[str, float] = {}
    finishes: dict[str, float] = {}
    for trainer in trainers:
        own = select(Attempt, Job).join(Job, Job.id == Attempt.job_id).where(Attempt.trainer_id == trainer.id)
        rows = session.execute(own.order_by(Attempt.started_at).limit(NUM_RECENT)).all()
        load = _load_seconds(*rows[0]) if rows else None
        finish = duration.median(
            [
                max(0.0, attempt.ended_at - trained_at)
                for attempt, job in rows
                if attempt.reason == EndReason.COMPLETED
                and attempt.ended_at is not None
                and (trained_at := (job.progress or {}).get("updated_at")) is not None
            ]
        )
        for name in _names(session, trainer):
            if load is not None:
                loads.setdefault(name, load)
            if finish is not None:
                finishes.setdefault(name, finish)
    return {
        name: Overheads(load_seconds=loads.get(name), finish_seconds=finishes.get(name)) for name in loads | finishes
    }


def _load_seconds(attempt: Attempt, job: Job) -> float | None:
    """The seconds from a trainer's first claim until it admitted the job; None if they are not known."""
    admitted_at = job.started_at  # in the job's first attempt that a trainer has admitted
    if attempt.number != 1 or admitted_at is None or (attempt.ended_at is not None and admitted_at > attempt.ended_at):
        return None
    return max(0.0, admitted_at - attempt.started_at)


def _names(session: Session, trainer: Trainer) -> tuple[str, str]:
    """The id of a trainer's worker, and the name of its device."""
    worker = session.get(Worker, trainer.worker_id)
    return trainer.worker_id, _device(worker) if worker else trainer.worker_id


def _as_measured(session: Session, worker_id: str, trainer: Trainer, report: Any) -> Measured | None:
    speeds = Speeds.of_report(report)
    base = session.scalar(select(BaseModelRow).where(BaseModelRow.digest == trainer.base_digest).limit(1))
    if not speeds.alone or base is None:
        return None
    num_parameters = int((base.description or {}).get("num_parameters", 0))
    return Measured(worker_id=worker_id, base_name=base.name, num_parameters=num_parameters, speeds=speeds)


def _expected_start(
    session: Session,
    job: Job,
    live: Sequence[Worker],
    fitting: Sequence[Worker],
    *,
    now: float,
    settings: Settings,
) -> duration.Estimate:
    took = _recent_seconds(session, job.project_id)
    place = ExpectedStart(
        ahead=_num_ahead(session, job, now=now, policy=Policy.of(settings)),
        typical_seconds=duration.median(took),
        num_typical=len(took),
        fitting=tuple(_occupied(session, row, job, settings) for row in fitting),
        num_live=len(live),
    )
    return duration.expected_start(place)


def _num_ahead(session: Session, job: Job, *, now: float, policy: Policy) -> int:
    """Return the number of jobs that would be ahead of the job if it entered the queue now."""
    wanted = requirements.of(session, job)
    planned = Candidate(
        job_id=job.id,
        project_id=job.project_id,
        base_digest=job.base_digest,
        pack_key=job.pack_key,
        priority=job.priority,
        place=now,
        queued_at=now,
        **asdict(wanted),
    )
    waiting = listing.candidates(session, now=now)
    shares = charging.shares_of_waiting(session, now=now, policy=policy)
    if job.project_id not in shares:
        usage = charging.used(session, [job.project_id], now=now, policy=policy)
        weight = session.get_one(Project, job.project_id).weight
        shares[job.project_id] = Share(
            weight=weight, device_seconds=usage[job.project_id], num_running=_num_running(session, job.project_id)
        )
    entries = order([*waiting, planned], now, shares=shares, served=charging.served(session, now=now), policy=policy)
    return next(entry.position for entry in entries if entry.candidate.job_id == job.id) - 1


def _num_running(session: Session, project_id: str) -> int:
    running = select(Job.id).where(Job.state == JobState.RUNNING, Job.project_id == project_id)
    return len(session.scalars(running).all())


def _recent_seconds(session: Session, project_id: str) -> list[float]:
    """The training times of the project's last succeeded jobs."""
    took: list[float] = []
    for priority in PriorityClass:
        ended = (Job.state == JobState.SUCCEEDED, Job.project_id == project_id, Job.priority == int(priority))
        last = select(Job.started_at, Job.finished_at).where(*ended).order_by(Job.created_at.desc()).limit(NUM_RECENT)
        for started_at, finished_at in session.execute(last):
            if started_at and finished_at:
                took.append(max(0.0, finished_at - started_at))
    return took


def _occupied(session: Session, row: Worker, job: Job, settings: Settings) -> Occupied:
    training = select(Job.progress).where(Job.state == JobState.RUNNING, Job.worker_id == row.id)
    left = tuple((progress or {}).get("seconds_left") for progress in session.scalars(training))
    trainer = session.get(Trainer, row.trainer_id) if row.trainer_id else None
    saturation: Json = (row.report or {}).get("saturation") or {}
    is_full = bool(saturation.get("is_full")) or len(left) >= settings.max_jobs_per_trainer
    has_base = trainer is not None and trainer.pack_key == job.pack_key
    return Occupied(worker_id=row.id, seconds_left=left, takes_it_now=has_base and not is_full)
