"""Cordons: workers that accept no new jobs, because an operator requested it or because several jobs failed on them.

A cordoned worker finishes its current jobs. The cordon applies to a host and its devices: the next worker that
registers there inherits it, so that a restart does not return a bad node to service. Only an operator removes it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.audit import log as audit
from catalog.audit.log import SERVER, Actor, AuditType
from catalog.db.database import Database, read_clock, serialize
from catalog.errors import Conflict, LorryError, NotFound
from catalog.history import events
from catalog.lifecycle import candidates, failures
from catalog.states import EndReason, JobState, reasons
from catalog.tables.fleet import Trainer, Worker, is_live
from catalog.tables.history import Attempt, Checkpoint
from catalog.tables.jobs import Job
from catalog.tables.table import Json
from catalog.tables.tenancy import ProjectUsage

log = logging.getLogger("lorry.catalog")
MAX_FAILED_RUNNING = 3
"""Number of jobs that must fail in a row on a node before it is cordoned."""
AT_FAULT = reasons(lambda ending: ending.may_be_nodes)
MAX_LOOKED_AT = 100
"""Maximum number of rows to read: ended attempts of one worker, and earlier workers of one host."""
OF_THE_SERVICE = f"{MAX_FAILED_RUNNING} jobs in a row failed on it."
OUT_OF_MEMORY = reasons(lambda ending: ending.is_of_memory)
USED_SECONDS = 86_400.0
BEFORE_ANY_JOB = f"It failed {MAX_FAILED_RUNNING} times in a row before a job had started."
OF_A_DRAIN = "It was drained."
By = Literal["operator", "service"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The end of one attempt."""

    job_id: str
    trainer_id: str
    reason: str
    culprit: str | None = None
    """Possible cause of the failure other than the node.

    None: the job. If the trainer never became ready: the pack key of its base model if that base model is known to
    fail to load (catalog/lifecycle/failures.py). If neither can be the cause: the trainer's id, which is unique.
    """


def cordon(db: Database, worker_id: str, *, reason: str | None = None) -> Worker:
    """Cordon a worker on request of an operator. An existing cordon is kept. Raises NotFound, Conflict."""
    with db.write() as session:
        worker = _locked_worker(session, worker_id)
        if worker.ended_at is not None:
            raise ended(worker_id, "cordoned")
        if worker.cordon is None:
            now = read_clock(session)
            _set_cordon(worker, by="operator", reason=reason, now=now)
            _note(session, "worker.cordoned", worker, now=now, details={"reason": reason} if reason else None)
            _notify_jobs(session, worker, "was cordoned. It finishes its current jobs, including this one.", now=now)
        return worker


def cordon_own(db: Database, worker_id: str, *, reason: str) -> None:
    """Cordon a worker that has found a fault of its own node. Its successor inherits the cordon."""
    with db.write() as session:
        close(session, worker_id, reason=reason)


def uncordon(db: Database, worker_id: str) -> Worker:
    """Remove a worker's cordon, and ignore earlier failures on it from now on.

    It also works for a worker that has stopped: its successor then inherits no cordon. Raises NotFound.
    """
    with db.write() as session:
        worker = _locked_worker(session, worker_id)
        if worker.cordon is not None:
            now = read_clock(session)
            details = {"was": {name: worker.cordon[name] for name in ("by", "reason", "at")}}
            worker.cordon, worker.uncordoned_at = None, now
            _note(session, "worker.uncordoned", worker, now=now, details=details)
            _notify_jobs(session, worker, "accepts new jobs again.", now=now)
        return worker


def drain(db: Database, worker_id: str) -> Worker:
    """Ask a worker to stop after it has saved and released its jobs. The worker and its successor are cordoned.

    Raises NotFound, Conflict.
    """
    with db.write() as session:
        worker = _locked_worker(session, worker_id)
        if worker.ended_at is not None:
            raise ended(worker_id, "drained")
        if not worker.drain_requested:
            now = read_clock(session)
            worker.drain_requested = True
            if worker.cordon is None:
                _set_cordon(worker, by="operator", reason=OF_A_DRAIN, now=now)
            _note(session, "worker.drained", worker, now=now)
            saved = "It saves a checkpoint, and the job continues on another worker."
            text = f"is draining. {saved} The attempt does not count as failed."
            _notify_jobs(session, worker, text, now=now)
        return worker


def retire(session: Session, worker: Worker, version: str, *, now: float) -> None:
    """Drain a worker whose protocol the upgraded service no longer supports, without a cordon for its successor.

    version: version of the upgraded service. The caller has locked the row.
    """
    worker.drain_requested = True
    details = {"reason": f"Lorry {version} does not support workers of protocol {worker.protocol}."}
    _note(session, "worker.drained", worker, now=now, details=details, actor=SERVER)
    text = f"is too old for Lorry {version}. It saves a checkpoint, and the job continues on another worker."
    _notify_jobs(session, worker, text, now=now)


def ended(worker_id: str, done: str) -> Conflict:
    return Conflict("worker_ended", worker_id=worker_id, done=done)


def inherit(session: Session, worker: Worker, *, is_live_after: float) -> None:
    """Move the cordon of a former worker with the same host and devices to this worker.

    The cordon moves rather than being copied, so that the number of cordoned workers on the same devices stays equal.
    is_live_after: a worker with a later heartbeat that has not stopped is still live and keeps its cordon. Both rows
    are locked afterwards.
    """
    before = (Worker.host == worker.host, Worker.id != worker.id, Worker.heartbeat_at <= worker.started_at)
    latest = select(Worker).where(*before).order_by(Worker.heartbeat_at.desc()).limit(MAX_LOOKED_AT)
    gone = (row for row in session.scalars(latest) if row.ended_at is not None or row.heartbeat_at <= is_live_after)
    cordoned = (row for row in gone if row.cordon is not None and place(row.devices) == place(worker.devices))
    if (last := next(cordoned, None)) is None:
        return
    row = session.get_one(Worker, last.id, with_for_update=True, populate_existing=True)
    worker.cordon, row.cordon = row.cordon, None


def inherit_late(session: Session, worker: Worker, *, now: float, silent_seconds: float) -> None:
    """Inherit a cordon at a heartbeat: a killed predecessor counts as gone only after `silent_seconds`.

    Does nothing if the worker is older than twice that time, or if an operator has uncordoned it.
    """
    is_new = now < worker.started_at + 2 * silent_seconds
    if is_new and worker.cordon is None and worker.uncordoned_at is None:
        inherit(session, worker, is_live_after=now - silent_seconds)


def place(devices: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return a key that identifies a worker's devices on its host. It survives storage as JSON unchanged."""
    return [
        (one.get("kind"), one.get("index"), *(one.get("indices") or ()), *("core", *(one.get("cores") or ())))
        for one in devices
    ]


def cordon_if_bad(db: Database, worker_id: str | None) -> bool:
    """Cordon the worker if its recent attempts show that the node is bad. Returns whether it was cordoned.

    Exceptions are logged and ignored: the next failed attempt triggers another check.
    """
    try:
        return bool(worker_id) and _cordon_if_bad(db, worker_id)
    except LorryError as error:
        log.warning("cordon code=%s", error.code)
    except Exception:  # the end of the attempt is already stored, and must not fail because of this check
        log.exception("crash in cordoning")
    return False


def _cordon_if_bad(db: Database, worker_id: str) -> bool:
    with db.write() as session:
        worker = session.get(Worker, worker_id, with_for_update=True)
        if worker is None or worker.cordon is not None or worker.ended_at is not None:
            return False
        since = max(worker.started_at, worker.uncordoned_at or 0.0)
        attempts = _of_node(session, worker_id, since=since)
        now = read_clock(session)
        ends = _ended(session, attempts, worker_id, now=now)
        blamed = failed_running(ends)
        if not blamed:
            return False
        found = [attempt for attempt, end in zip(attempts, ends, strict=True) if end in blamed]
        if not _is_beyond_one_project(session, worker_id, found, blamed, now=now):
            return False
        if not _may_cordon_another(session, now=now):
            log.warning("cordon limit: worker=%s failed jobs, but a third of the fleet is already cordoned", worker_id)
            return False
        jobs = sorted({attempt.job_id for attempt in found})
        evidence, details = [_evidence(one) for one in found], {"jobs": jobs[:MAX_FAILED_RUNNING]}
        has_several_jobs = len(jobs) >= MAX_FAILED_RUNNING
        reason = OF_THE_SERVICE if has_several_jobs else BEFORE_ANY_JOB
        why = "this job and others failed there in a row" if has_several_jobs else "this job failed there repeatedly"
        _cordon_by_service(session, worker, reason, now=now, evidence=evidence, details=details)
        text = f"was cordoned because {why}; {_consequence()}"
        _add_events(session, worker, jobs, text, now=now)
        return True


def close(session: Session, worker_id: str, *, reason: str, evidence: Sequence[Json] = ()) -> None:
    """Cordon a worker on behalf of the service. An existing cordon is kept."""
    worker = session.get(Worker, worker_id, with_for_update=True)
    if worker is not None and worker.cordon is None and worker.ended_at is None:
        now = read_clock(session)
        _cordon_by_service(session, worker, reason, now=now, evidence=evidence)
        _notify_jobs(session, worker, f"was cordoned. {reason} {_consequence().capitalize()}", now=now)


def _cordon_by_service(
    session: Session,
    worker: Worker,
    reason: str,
    *,
    now: float,
    evidence: Sequence[Json],
    details: Json | None = None,
) -> None:
    _set_cordon(worker, by="service", reason=reason, now=now, evidence=evidence)
    all_details = {"reason": reason, **(details or {})}
    _note(session, "worker.cordoned", worker, now=now, details=all_details, actor=SERVER)


def _of_node(session: Session, worker_id: str, *, since: float) -> list[Attempt]:
    """Return the ended attempts that show the state of the worker's node, newest first.

    They are its own attempts, except those attributed to another member of its gang, attempts of other members that
    are attributed to it, and attempts that succeeded with its participation.
    """
    latest = select(Attempt).order_by(Attempt.ended_at.desc(), Attempt.claim_id).limit(MAX_LOOKED_AT)
    is_own = func.coalesce(Attempt.blamed_worker_id, worker_id) == worker_id
    own = session.scalars(latest.where(Attempt.worker_id == worker_id, Attempt.ended_at > since, is_own)).all()
    of_others = (Attempt.blamed_worker_id == worker_id, Attempt.worker_id != worker_id, Attempt.ended_at > since)
    attributed = session.scalars(latest.where(*of_others)).all()
    found = [*own, *attributed, *(_succeeded_with(session, worker_id, attributed) if attributed else ())]
    return sorted(found, key=lambda attempt: (-(attempt.ended_at or 0.0), attempt.claim_id))[:MAX_LOOKED_AT]


def _succeeded_with(session: Session, worker_id: str, attributed: Sequence[Attempt]) -> list[Attempt]:
    """Return the latest successful attempts of its gang leaders in trainers in which the worker participated."""
    leaders, oldest = {one.worker_id for one in attributed}, min(one.ended_at or 0.0 for one in attributed)
    successes = (Attempt.worker_id.in_(leaders), Attempt.ended_at > oldest, Attempt.reason == EndReason.COMPLETED)
    found = select(Attempt, Trainer).join(Trainer, Trainer.id == Attempt.trainer_id).where(*successes)
    rows = session.execute(found.order_by(Attempt.ended_at.desc()).limit(MAX_LOOKED_AT)).all()
    return [attempt for attempt, trainer in rows if worker_id in _participants(trainer)]


def _participants(trainer: Trainer) -> list[str]:
    """Return the workers whose devices the trainer used, including its own worker."""
    return (trainer.report or {}).get("gang", {}).get("workers", [])


def failed_running(ends: Sequence[Ended]) -> list[Ended]:
    """Return the failures that are attributed to the node, newest first; [] if its jobs may be the cause. Pure.

    ends: newest first; only those after the last successful job count. A job that crashes its trainer also fails its
    packmates. The node is therefore at fault only if no two jobs explain all failures, that is, if no two jobs were in
    all failed trainers between them. A base model that fails to load everywhere counts as one cause, rather than each
    of its jobs: otherwise it would get one node after another cordoned. If the node failed before any job had started,
    no job can be the cause.
    """
    bad: list[Ended] = []
    for end in ends:
        if end.reason == EndReason.COMPLETED:
            break
        if end.reason in AT_FAULT:
            bad.append(end)
    by_trainer: dict[str, set[str]] = {}
    for end in bad:
        by_trainer.setdefault(end.trainer_id, set()).add(end.culprit or end.job_id)
    return [] if _could_have_caused(by_trainer.values(), MAX_FAILED_RUNNING - 1) else bad


def _is_beyond_one_project(
    session: Session, worker_id: str, attempts: Sequence[Attempt], blamed: Sequence[Ended], *, now: float
) -> bool:
    """Return whether the jobs of a single project can't explain the failures. No project can get nodes cordoned alone.

    They can't if a trainer failed without a job of that project, if enough of the failed jobs have since progressed on
    another worker, or if no other project uses the service. attempts: the attempts of these failures.
    """
    owners = select(Job.id, Job.project_id).where(Job.id.in_({end.job_id for end in blamed}))
    project_of = {row.id: row.project_id for row in session.execute(owners)}
    by_trainer: dict[str, set[str]] = {}
    for end in blamed:
        by_trainer.setdefault(end.trainer_id, set()).add(end.culprit or project_of[end.job_id])
    return (
        not _could_have_caused(by_trainer.values(), 1)
        or len(_progressed_elsewhere(session, worker_id, attempts)) >= MAX_FAILED_RUNNING
        or not _is_used_by_others(session, set(project_of.values()), now=now)
    )


def _progressed_elsewhere(session: Session, worker_id: str, attempts: Sequence[Attempt]) -> set[str]:
    """Return jobs that failed here and later completed or saved a checkpoint on another worker: they crash no trainer.

    Out-of-memory failures are excluded: such a job may fit only on the other worker's larger devices.
    """
    failed_at = {one.job_id: one.ended_at or 0.0 for one in attempts if one.reason not in OUT_OF_MEMORY}
    newest = select(Checkpoint.job_id, func.max(Checkpoint.created_at).label("at")).where(
        Checkpoint.job_id.in_(failed_at)
    )
    checkpoint_at = {row.job_id: row.at for row in session.execute(newest.group_by(Checkpoint.job_id))}
    elsewhere = select(Attempt).where(Attempt.job_id.in_(failed_at), Attempt.worker_id != worker_id)
    return {
        one.job_id
        for one in session.scalars(elsewhere)
        if one.started_at >= failed_at[one.job_id]
        and (one.reason == EndReason.COMPLETED or checkpoint_at.get(one.job_id, 0.0) > one.started_at)
    }


def _is_used_by_others(session: Session, project_ids: Collection[str], *, now: float) -> bool:
    """Return whether another project has a queued job, or has used a device within the last day."""
    used = (ProjectUsage.project_id.not_in(project_ids), ProjectUsage.as_of > now - USED_SECONDS)
    if session.scalar(select(ProjectUsage.project_id).where(*used).limit(1)) is not None:
        return True
    waiting = candidates.projects(JobState.QUEUED)
    return session.scalar(select(waiting.c.project_id).where(waiting.c.project_id.not_in(project_ids))) is not None


def _may_cordon_another(session: Session, *, now: float) -> bool:
    """Return whether the limit allows another cordon for failed jobs: a third of the live workers, but at least one.

    Until this transaction ends, no other one decides, because it would not count this cordon.
    """
    serialize(session, "cordon for failed jobs")
    live = session.scalars(select(Worker.cordon).where(is_live(now=now))).all()
    cordoned = sum((cordon or {}).get("reason") in (OF_THE_SERVICE, BEFORE_ANY_JOB) for cordon in live)
    return cordoned < max(1, len(live) // 3)


def _could_have_caused(packs: Collection[set[str]], number: int) -> bool:
    """Return whether some set of `number` jobs has a member in every pack."""
    if len(packs) <= number:
        return True
    jobs = sorted(set[str]().union(*packs))
    return any(
        all(pack.intersection(chosen) for pack in packs) for chosen in combinations(jobs, min(number, len(jobs)))
    )


def _ended(session: Session, attempts: Sequence[Attempt], worker_id: str, *, now: float) -> list[Ended]:
    culprits = _culprits(session, attempts, worker_id, now=now)
    return [
        Ended(
            job_id=attempt.job_id,
            trainer_id=attempt.trainer_id,
            reason=attempt.reason or "",
            culprit=culprits.get(attempt.claim_id),
        )
        for attempt in attempts
    ]


def _culprits(session: Session, attempts: Sequence[Attempt], worker_id: str, *, now: float) -> dict[str, str]:
    """Return `Ended.culprit` by claim, for attempts since the last trainer that became ready on the worker.

    The node is the only possible cause if it failed before the job and the base model were involved, or if other
    workers have recently loaded the base model. It is the likely cause if several base models fail. If a single base
    model fails that no worker has loaded yet, either may be the cause, and each failed job counts as evidence.

    attempts: newest first.
    """
    ids = {attempt.trainer_id for attempt in attempts}
    trainers = {trainer.id: trainer for trainer in session.scalars(select(Trainer).where(Trainer.id.in_(ids)))}

    def became_ready(attempt: Attempt) -> bool:
        trainer = trainers.get(attempt.trainer_id)
        return trainer is not None and failures.was_ready(trainer.report)

    not_ready = list(takewhile(lambda attempt: not became_ready(attempt), attempts))
    of_load = [one for one in not_ready if one.reason in failures.OF_A_LOAD and one.trainer_id in trainers]
    keys = {one.claim_id: trainers[one.trainer_id].pack_key for one in of_load}
    suspect = {key for key in set(keys.values()) if failures.is_base_suspect(session, key, worker_id, now=now)}
    others = set(keys.values()) - suspect
    loadable = others if len(others) > 1 else {key for key in others if failures.has_been_loaded(session, key)}
    found = {claim_id: key for claim_id, key in keys.items() if key in suspect}
    for one in not_ready:
        if one.reason == EndReason.NODE_FAILED or keys.get(one.claim_id) in loadable:
            found[one.claim_id] = one.trainer_id
    return found


def _evidence(attempt: Attempt) -> Json:
    return {
        "job_id": attempt.job_id,
        "attempt": attempt.number,
        "trainer_id": attempt.trainer_id,
        "reason": attempt.reason,
        "detail": attempt.detail,
        "ended_at": attempt.ended_at,
    }


def _set_cordon(worker: Worker, *, by: By, reason: str | None, now: float, evidence: Sequence[Json] = ()) -> None:
    worker.cordon = {"by": by, "reason": reason, "at": now, "evidence": list(evidence)}


def _locked_worker(session: Session, worker_id: str) -> Worker:
    worker = session.get(Worker, worker_id, with_for_update=True)
    if worker is None:
        raise NotFound("worker_not_found", worker_id=worker_id)
    return worker


def _note(
    session: Session,
    type: AuditType,  # noqa: A002  (the API's field name)
    worker: Worker,
    *,
    now: float,
    details: Json | None = None,
    actor: Actor | None = None,
) -> None:
    all_details = {"host": worker.host, **(details or {})}
    audit.note(session, type, now=now, object_id=worker.id, project_id=None, details=all_details, actor=actor)


def _notify_jobs(session: Session, worker: Worker, text: str, *, now: float) -> None:
    """Add an event to each job that the worker holds."""
    claimed = (Job.state == JobState.RUNNING, Job.worker_id == worker.id, Job.claim_id.is_not(None))
    _add_events(session, worker, session.scalars(select(Job.id).where(*claimed).order_by(Job.id)).all(), text, now=now)


def _add_events(session: Session, worker: Worker, job_ids: Sequence[str], text: str, *, now: float) -> None:
    for job_id in job_ids:
        data = {"worker_id": worker.id}
        events.add(session, job_id, now=now, level="warn", message=f"Worker {worker.id} {text}", data=data)


def _consequence() -> str:
    return "it accepts no new jobs until an operator uncordons it."


def count(session: Session) -> int:
    """Return the number of cordoned workers that have not stopped."""
    cordoned = (Worker.cordon.is_not(None), Worker.ended_at.is_(None))
    return session.scalar(select(func.count()).select_from(Worker).where(*cordoned)) or 0
