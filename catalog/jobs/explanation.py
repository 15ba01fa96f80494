"""Explains a job's current state: a text for users, and the facts behind it."""

from __future__ import annotations

from dataclasses import asdict

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from catalog.admission.accept import INSTALL_QUANT
from catalog.db.database import Database, read_clock
from catalog.fleet import gangs as gang_views
from catalog.fleet import placement, views
from catalog.fleet.views import LoadedTrainer
from catalog.history.queries import find
from catalog.lifecycle import deadlines
from catalog.lifecycle.trials import trial_of
from catalog.queue import charging, listing
from catalog.resources import sharding, throughput
from catalog.resources.memory import readable
from catalog.resources.pack_key import precision_of, quantization_of, weights_of
from catalog.resources.sharding import SINGLE
from catalog.scheduling import ordering
from catalog.scheduling.ordering import QueueEntry
from catalog.scheduling.snapshot import PATIENCE_SECONDS, USUAL, Capacity, Policy
from catalog.states import MAX_COUNTED_ATTEMPTS, EndReason, JobState, PriorityClass
from catalog.tables.fleet import Worker
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from catalog.tables.storage import BaseModelRow
from catalog.tables.table import Json
from catalog.tables.tasks import Task
from catalog.tasks import task_queue
from catalog.tasks.task_queue import TaskKind
from catalog.usage import quotas
from catalog.usage.quotas import QuotaStatus

MAX_NAMED = 20
"""Maximum number of jobs ahead that are listed by id."""
NO_WORKER = "No worker is running. Start one: `lorry up` or `lorry worker`."
NOTHING = Capacity(max_jobs=1, memory_bytes_free=0)
ON_A_GPU = Capacity(max_jobs=1, memory_bytes_free=0, recomputes=True)


def explain(db: Database, *, project_id: str, job_id: str, policy: Policy = USUAL, sees_all: bool = False) -> Json:
    """Return `explanation` (a text), `state`, and facts that depend on the state.

    sees_all: include the weights and usage of other projects, for operators only.
    """
    with db.snapshot() as session:
        job = find(session, project_id, job_id)
        now = read_clock(session)
        match JobState(job.state):
            case JobState.VALIDATING_FILES:
                sentence, facts = _validating(session, job, now=now, policy=policy)
            case JobState.QUEUED:
                sentence, facts = _queued(session, job, now=now, policy=policy, sees_all=sees_all)
            case JobState.RUNNING:
                sentence, facts = _running(session, job, now=now)
            case JobState.PAUSED:
                sentence, facts = f"It is paused. To continue where it stopped: `lorry jobs resume {job.id}`.", {}
            case JobState.SUCCEEDED:
                sentence, facts = f"It has succeeded: its adapter is {job.adapter_name}.", {"adapter": job.adapter_name}
            case JobState.FAILED:
                error = job.error or {}
                sentence, facts = f"It failed. {error.get('message', '')}".strip(), {"error": error}
            case JobState.CANCELLED:
                sentence, facts = "It was cancelled.", {}
        trial, explanation = _trial_facts(session, job)
        explanation = f"{sentence} {explanation}" if explanation else sentence
        identity = {"job_id": job.id, "state": job.state, "reason": job.reason}
        return {**identity, "explanation": explanation, "sweep": trial, **facts}


def _trial_facts(session: Session, job: Job) -> tuple[Json | None, str]:
    trial = trial_of(session, job)
    if trial is None:
        return None, ""
    facts: Json = {"id": trial.sweep_id, "trial": trial.number, "parameters": trial.parameters}
    stopped = f" The sweep stopped it. {trial.stopped}." if trial.stopped else ""
    return {**facts, "stopped": trial.stopped}, f"It is trial {trial.number} of sweep {trial.sweep_id}.{stopped}"


def _validating(session: Session, job: Job, *, now: float, policy: Policy) -> tuple[str, Json]:
    residents = views.residents(session, now=now)
    facts: Json = {
        "worker_id": job.worker_id,
        "run_after": job.run_after,
        "live_workers": len(residents),
        "closed_workers": placement.closed_workers(residents),
    }
    task = session.get_one(Task, (TaskKind.PREPARATION, job.id))
    if task.claim_id is not None:
        return f"Worker {job.worker_id} is tokenizing its files.", facts
    if task.run_after > now:
        return f"Tokenization of its files will be retried in {task.run_after - now:.0f} s.", facts
    unclaimed = (Task.kind == TaskKind.PREPARATION, Task.claim_id.is_(None))
    place = task_queue.place(policy.priority_aging_seconds)
    is_earlier = place < task.run_after + task.priority * policy.priority_aging_seconds
    own = select(func.count()).where(*unclaimed, Task.project_id == job.project_id, is_earlier)
    others = select(Task.project_id).where(*unclaimed, Task.project_id != job.project_id).limit(1)
    facts["ahead"] = session.scalar(own) or 0
    facts["is_shared_with_other_projects"] = session.scalar(others) is not None
    if not facts["live_workers"]:
        return NO_WORKER, facts
    if (closed := placement.why_all_closed(residents)) is not None:
        return f"Its files wait for tokenization. {closed}", facts
    text = f"Its files wait for tokenization. {_jobs(facts['ahead'])} ahead of it in its project."
    others = " Files of other projects are tokenized in between." if facts["is_shared_with_other_projects"] else ""
    return text + others, facts


def _queued(session: Session, job: Job, *, now: float, policy: Policy, sees_all: bool) -> tuple[str, Json]:
    live = views.residents(session, now=now)
    accepting, gangs = placement.accepting(live), gang_views.gang_views(session, now=now)
    lenders = gang_views.lending_workers(gangs)
    residents = [resident for resident in accepting if resident.worker_id not in lenders]
    facts: Json = {
        "run_after": job.run_after,
        "counted_attempts": job.counted_attempts,
        "live_workers": len(live),
        "closed_workers": placement.closed_workers(live),
        "gangs": gang_views.gang_view_facts(gangs),
        "resident_bases": sorted({resident.base_digest for resident in residents if resident.base_digest}),
        "resident_precisions": _precisions(residents, job.base_digest),
        "base_digest": job.base_digest,
        "precision": precision_of(job.pack_key),
        "quantization": quantization_of(job.pack_key),
        "priority": PriorityClass(job.priority).name,
    }
    facts |= {"is_held": job.is_held, **deadlines.facts(job, now)}
    facts |= {"placements": placement.of_waiting(session, job, now=now, lenders=lenders)}
    blocked = _blocked(session, job, now=now)
    if blocked is not None:
        return blocked[0], facts | blocked[1]
    entries = listing.queue_entries(session, now=now, policy=policy)
    own_entry = next((entry for entry in entries if entry.candidate.job_id == job.id), None)
    shares = charging.shares_of_waiting(session, now=now, policy=policy)
    share = ordering.describe_share(shares, job.project_id, policy)
    facts |= {"share": share, "policy": asdict(policy)}
    facts |= {"shares": ordering.all_shares(shares, policy)} if sees_all else {}
    if own_entry is None:
        facts |= {"ahead_at_least": len(entries), "ahead_of_this_project_in_all": _own_ahead(session, job)}
        return _far_behind(facts), facts
    ahead = [entry for entry in entries if entry.position < own_entry.position]
    facts |= _place(own_entry, ahead, job)
    facts |= _last_preemption(session, job) | {"preemption_requested_at": job.preemption_requested_at}
    if not facts["live_workers"]:
        return NO_WORKER, facts
    hindrance = (
        placement.why_all_closed(live)
        or _unquantized(session, job, now=now)
        or _too_large(session, job, own_entry, now=now)
        or gang_views.why_all_wait(gangs, [one.worker_id for one in accepting])
    )
    if hindrance:
        return hindrance, facts
    parts = (
        _preempted_sentence(facts["preemption"]),
        _queue_sentence(job, own_entry, ahead, residents),
        _free_memory_sentence(session, own_entry, residents),
        placement.why_base_closed(live, job.base_digest),
        _preempting_sentence(own_entry),
        deadlines.sentence(job, now),
        ordering.share_sentence(share),
    )
    return " ".join(part for part in parts if part), facts


def _blocked(session: Session, job: Job, *, now: float) -> tuple[str, Json] | None:
    """Return the reason why the job can't be claimed at any queue position; None if it can."""
    if job.is_held:
        return f"It is held. To let it start, release it: `lorry jobs release {job.id}`.", {}
    if job.run_after is not None and job.run_after > now:
        return f"Retrying in {job.run_after - now:.0f} s after a failed attempt ({job.reason}).", {}
    reached = quotas.holds(session, now=now, project_ids=[job.project_id]).get(job.project_id)
    return None if reached is None else (_limited(reached), {"quota": reached.values()})


def _last_preemption(session: Session, job: Job) -> Json:
    """Return the details of the preemption if the job's last attempt was preempted."""
    last = select(Attempt).where(Attempt.job_id == job.id).order_by(Attempt.number.desc()).limit(1)
    attempt = session.scalar(last) if job.reason == EndReason.PREEMPTED else None
    preemption = attempt.preemption if attempt is not None else None
    return {"preemption": preemption, "num_preemptions": job.num_preemptions}


def _preempted_sentence(preemption: Json | None) -> str | None:
    """Return a sentence about the preemption. It does not name the urgent job, which may belong to another project."""
    if preemption is None:
        return None
    above = PriorityClass(preemption["for_class"]).name
    return (
        f"A job with priority {above} that had waited for {preemption['for_waited_seconds']:.0f} s preempted it. "
        f"It had trained for {preemption['trained_seconds']:.0f} s, with effective priority "
        f"{_class_name(preemption['effective_priority'])}. It will continue from the checkpoint that it saved."
    )


def _class_name(effective_priority: int) -> str:
    return PriorityClass(effective_priority).name if effective_priority >= 0 else "above urgent"


def _preempting_sentence(own_entry: QueueEntry) -> str | None:
    if not own_entry.awaits_preemption:
        return None
    return "Jobs with a lower priority free memory for it: they save a checkpoint and return to the queue."


def _own_ahead(session: Session, job: Job) -> int:
    """Return the number of jobs of the same project and class that are ahead of the job."""
    is_before = or_(Job.place < job.place, and_(Job.place == job.place, Job.id < job.id))
    alike = (Job.project_id == job.project_id, Job.priority == job.priority)
    same_class = (Job.state == job.state, *alike, Job.is_held.is_(False))
    return session.scalar(select(func.count()).where(*same_class, is_before)) or 0


def _far_behind(facts: Json) -> str:
    own = _jobs(facts["ahead_of_this_project_in_all"]).lower()
    return (
        f"More than {facts['ahead_at_least']} jobs are ahead of it. "
        f"In its own project, {own} ahead of it with the same priority."
    )


def _limited(quota: QuotaStatus) -> str:
    ends = {"concurrent_jobs": "It waits until one of them has finished"}
    until = ends.get(quota.name, "It waits until the end of the month")
    return f"Its project has reached its limit of {quota.describe()}. {until}, or until an operator raises the limit."


def _place(own_entry: QueueEntry, ahead: list[QueueEntry], job: Job) -> Json:
    """Return the facts about the job's queue position. Jobs of other projects are counted but not listed."""
    own = [entry.candidate.job_id for entry in ahead if entry.candidate.project_id == job.project_id]
    return {
        "position": own_entry.position,
        "ahead": len(ahead),
        "ahead_of_this_project": own[:MAX_NAMED],
        "waited_seconds": own_entry.waited_seconds,
        "position_reason": own_entry.reason,
        "effective_priority": own_entry.effective_priority,
        "normalized_usage": own_entry.level,
        "effective_level": own_entry.effective_level,
    }


def _precisions(residents: list[LoadedTrainer], base_digest: str) -> list[str]:
    """Return the precisions in which the job's base model is loaded."""
    keys = {resident.pack_key for resident in residents if resident.base_digest == base_digest}
    return sorted(precision_of(key) for key in keys if key)


def _queue_sentence(job: Job, own_entry: QueueEntry, ahead: list[QueueEntry], residents: list[LoadedTrainer]) -> str:
    if own_entry.candidate.is_suspect:
        return f"{_ends_sentence(job)}. It waits for an idle worker and trains alone there, to affect no other job."
    place = f"{_jobs(len(ahead))} ahead of it." if ahead else "It is first in the queue."
    of_its_base = [resident for resident in residents if resident.base_digest == job.base_digest]
    joinable = [resident for resident in of_its_base if resident.pack_key in (job.pack_key, None)]
    if joinable:
        near_plateau = [throughput.explained(resident.saturation) for resident in joinable]
        why = near_plateau[0] if all(near_plateau) else None
        return f"{place} {why or _joins(ahead)}"
    if any(resident.base_digest is None for resident in residents):
        return place if ahead else "It is first in the queue and waits for a worker with free capacity."
    return f"{place} {_other_trainer(job, of_its_base)} {_overtaking_sentence(own_entry)}"


def _ends_sentence(job: Job) -> str:
    if job.lost_attempts:
        number = job.counted_attempts + job.lost_attempts
        return f"{number} trainers or workers have failed while they trained it, since its last checkpoint"
    return f"{job.counted_attempts} of {MAX_COUNTED_ATTEMPTS} attempts have failed"


def _joins(ahead: list[QueueEntry]) -> str:
    if any(entry.awaits_preemption for entry in ahead):
        return "A worker has its base model loaded, but other jobs are being preempted for a job that is ahead of it."
    return "A worker has its base model loaded. It starts as soon as that worker has memory for one more job."


def _other_trainer(job: Job, of_its_base: list[LoadedTrainer]) -> str:
    """Return the reason why the job can't join a loaded trainer."""
    if not of_its_base:
        return "The running workers have other base models loaded."
    loaded = " and ".join(sorted({weights_of(resident.pack_key) for resident in of_its_base if resident.pack_key}))
    wanted = weights_of(job.pack_key)
    return f"Its base model is loaded in {loaded}, but it needs {wanted}, so it waits until a worker has loaded that."


def _overtaking_sentence(own_entry: QueueEntry) -> str:
    if own_entry.awaits_preemption:
        return "Later jobs do not start before it."
    if own_entry.waited_seconds < PATIENCE_SECONDS:
        return f"Later jobs for a loaded base model may start before it, for at most {PATIENCE_SECONDS:.0f} s."
    return "Later jobs no longer start before it. It starts when the running jobs have finished."


def _unquantized(session: Session, job: Job, *, now: float) -> str | None:
    wanted, found = quantization_of(job.pack_key), views.quantizations(session, now=now, only_open=True)
    if found is None or wanted in found:
        return None
    return f"It needs its base model in {wanted}, but no running worker has bitsandbytes. {INSTALL_QUANT}"


def _too_large(session: Session, job: Job, own_entry: QueueEntry, *, now: float) -> str | None:
    capacities = views.empty_capacities(session, now=now)
    found = [(capacity.group, capacity.demand(own_entry.candidate)) for capacity in capacities] or [
        (SINGLE, NOTHING.demand(own_entry.candidate))
    ]
    description = session.get_one(BaseModelRow, job.base_model).description or {}
    hindrance = sharding.hindrance(job.spec["lora"], quantization_of(job.pack_key), description)
    misfit = sharding.explain_misfit(found, hindrance)
    if misfit is None:
        return None
    fits = sharding.would_fit_sentence(sharding.would_fit(ON_A_GPU.demand(own_entry.candidate)))
    return f"{misfit} {fits} Add such a worker, or cancel the job and use a lower rank or a smaller base model."


def _free_memory_sentence(session: Session, own_entry: QueueEntry, residents: list[LoadedTrainer]) -> str | None:
    """Return a sentence if idle workers have the total memory for the job, but other processes use too much of it."""
    empty = [resident.worker_id for resident in residents if resident.base_digest is None]
    reported = views.reported_when_empty(session, empty)
    needed = [(capacity.alone(own_entry.candidate), worker_id, capacity) for worker_id, capacity in reported]
    if len(reported) < len(empty) or any(need <= capacity.memory_bytes_free for need, _, capacity in needed):
        return None
    found = [one for one in needed if one[0] <= one[2].group.bytes_of_each]
    if not found:
        return None
    need, worker_id, capacity = max(found, key=lambda one: one[2].memory_bytes_free - one[0])
    free, whole = readable(capacity.memory_bytes_free), readable(capacity.group.bytes_of_each)
    return (
        f"It needs about {readable(need)}. Worker {worker_id} is idle, but only {free} of its {whole} are free: "
        "other processes use the rest. Free memory there, or add a worker with enough free memory."
    )


def _running(session: Session, job: Job, *, now: float) -> tuple[str, Json]:
    attempt, placements = session.get(Attempt, job.claim_id), placement.of_running(session, job)
    facts: Json = {
        "worker_id": job.worker_id,
        "trainer_id": job.trainer_id,
        "attempt": job.attempt,
        "why": attempt.why if attempt else None,
        "progress": job.progress,
        "strategy": placements[0]["strategy"] if placements else None,
        "placements": placements,
        "preemption": attempt.preemption if attempt and job.preempted_for else None,
        **deadlines.facts(job, now),
    }
    if job.cancel_requested:
        return f"It is being cancelled. Worker {job.worker_id} was asked to stop it.", facts
    if job.pause_requested:
        return f"It is being paused. Worker {job.worker_id} was asked to save a checkpoint first.", facts
    if job.preempted_for is not None:
        preempted = f"An urgent job is preempting it. Worker {job.worker_id} was asked to save a checkpoint first."
        return f"{preempted} It then returns to its position in the queue.", facts
    around = placement.drain_or_cordon(session.get(Worker, job.worker_id) if job.worker_id else None)
    begun = f"It is training on worker {job.worker_id}, attempt {job.attempt}."
    if job.started_at is None:
        begun = f"It is starting on worker {job.worker_id}, attempt {job.attempt}. The base model is being loaded."
    among_several = placements[0]["reason"] if placements and placements[0]["num_devices"] > 1 else None
    parts = (begun, among_several, around, deadlines.sentence(job, now))
    return " ".join(filter(None, parts)), facts


def _jobs(number: int) -> str:
    return {0: "No job is", 1: "1 job is"}.get(number, f"{number} jobs are")
