"""Maps the end of an attempt to the job's next state. `decide` is pure; `end_attempt` writes its decision."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from catalog.error_texts import ErrorText
from catalog.lifecycle import failures
from catalog.lifecycle.transitions import move
from catalog.lifecycle.trials import ended_for
from catalog.states import ENDINGS, MAX_COUNTED_ATTEMPTS, MAX_LOSSES, EndReason, JobState, Verb, reasons
from catalog.storage.manifest import DAMAGED
from catalog.tables.history import Attempt, Checkpoint
from catalog.tables.jobs import Job
from catalog.tables.table import Json
from catalog.usage import ledger

BACK_OFF_SECONDS = (2.0, 8.0, 30.0)
"""Waits before the next attempt by the number of failed attempts so far. The last value also applies to later ones."""
BAD = reasons(lambda ending: ending.is_bad)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptOutcome:
    """The consequences for the job."""

    verb: Verb
    counted_attempts: int
    wait_seconds: float = 0.0
    is_quarantine: bool = False


def decide(
    reason: EndReason,
    *,
    cancel_requested: bool,
    pause_requested: bool,
    counted_attempts: int,
    is_bystander: bool = False,
    losses: int = 1,
    num_shortages: int = 0,
    min_wait_seconds: float = 0.0,
) -> AttemptOutcome:
    """Return the verb for the job: the user's pending request decides first, then ENDINGS.

    A request survives a crash; only a completion takes precedence over it.

    is_bystander: the trainer exited before it had started the job, and the base model is not at fault. losses: bad ends
    in a row, if the job did not cause the last one. num_shortages: the number of out-of-memory attempts including this
    one, or 0 if this attempt did not run out of memory. min_wait_seconds: the minimum wait before a retry.
    """
    ending = ENDINGS[reason]
    is_loss = _is_loss(reason, is_bystander=is_bystander)
    counted = counted_attempts + int(ending.is_counted and not is_loss)
    if 0 < num_shortages < failures.MAX_OUT_OF_MEMORY:
        counted = min(counted, failures.ALONE)  # one slice per tick was not tried yet
    requested = _requested_verb(reason, cancel_requested=cancel_requested, pause_requested=pause_requested)
    if requested is not None:
        return AttemptOutcome(verb=requested, counted_attempts=counted)
    if not ending.retryable:
        return AttemptOutcome(verb=Verb.FAIL, counted_attempts=counted)
    if not ending.counts and not is_loss:
        return AttemptOutcome(verb=Verb.RELEASE, counted_attempts=counted)
    number, most = (losses, MAX_LOSSES) if is_loss else (counted, MAX_COUNTED_ATTEMPTS)
    if number >= most:
        return AttemptOutcome(verb=Verb.FAIL, counted_attempts=counted, is_quarantine=True)
    wait = max(min_wait_seconds, BACK_OFF_SECONDS[min(number, len(BACK_OFF_SECONDS)) - 1])
    return AttemptOutcome(verb=Verb.REQUEUE, counted_attempts=counted, wait_seconds=wait)


def _is_loss(reason: EndReason, *, is_bystander: bool) -> bool:
    """Whether the attempt ended badly, but not because of the job. Such ends are limited by MAX_LOSSES."""
    ending = ENDINGS[reason]
    return reason is EndReason.INFRA_LOST or (is_bystander and ending.is_counted)


def _requested_verb(reason: EndReason, *, cancel_requested: bool, pause_requested: bool) -> Verb | None:
    """The verb for the user's pending request, or None if there is none or this end reason overrides it."""
    if reason in (EndReason.CANCELLED_BY_USER, EndReason.PRUNED):
        return Verb.APPLY_CANCEL
    is_pause = reason is EndReason.PAUSED_BY_USER
    if not is_pause and not ENDINGS[reason].retryable:
        return None
    if cancel_requested:
        return Verb.APPLY_CANCEL
    if pause_requested:
        return Verb.APPLY_PAUSE
    return Verb.RELEASE if is_pause else None  # the pause was withdrawn in the meantime


def end_attempt(
    session: Session,
    job: Job,
    *,
    reason: EndReason,
    detail: str,
    error: Json | None = None,
    is_bystander: bool = False,
    now: float,
) -> JobState:
    """End the attempt that holds `job`, whose row this transaction has locked. Returns the job's next state.

    Not for completions. is_bystander: the trainer exited before it had started the job. The job's base model may still
    be at fault.
    """
    assert reason is not EndReason.COMPLETED, "use claims.complete, which also publishes the adapter"
    if reason is EndReason.CANCELLED_BY_USER:
        reason = ended_for(session, job, reason)
    close_attempt(session, job, reason=reason, detail=detail, now=now)
    is_bystander = is_bystander and not failures.is_at_fault(session, job, reason, now=now)
    min_wait_seconds = failures.backoff_seconds(session, job, now=now) if ENDINGS[reason].may_be_nodes else 0.0
    losses = _losses(session, job) if _is_loss(reason, is_bystander=is_bystander) else 0
    num_shortages = failures.num_out_of_memory_at_end(session, job, reason)
    verdict = decide(
        reason,
        cancel_requested=job.cancel_requested,
        pause_requested=job.pause_requested,
        counted_attempts=job.counted_attempts,
        is_bystander=is_bystander,
        losses=losses,
        num_shortages=num_shortages,
        min_wait_seconds=min_wait_seconds,
    )
    job.counted_attempts = verdict.counted_attempts
    job.lost_attempts += reason is EndReason.INFRA_LOST
    job.num_preemptions += reason is EndReason.PREEMPTED
    if verdict.verb is Verb.FAIL:
        is_quarantined, number = verdict.is_quarantine, losses or job.counted_attempts
        job.error = (
            _quarantined(session, job, reason, detail, number, error=error)
            if is_quarantined
            else _failed(reason, detail, error)
        )
    level = "error" if verdict.verb is Verb.FAIL else "warn" if verdict.verb is Verb.REQUEUE else "info"
    if verdict.verb is Verb.APPLY_CANCEL:
        reason = ended_for(session, job, reason)
    message = _message(job, verdict, reason, detail, is_loss=losses > 0)
    if num_shortages and verdict.verb is Verb.REQUEUE:
        message += f" {failures.next_attempt_text(num_shortages, counted_attempts=verdict.counted_attempts)}"
    state = move(session, job, verdict.verb, now=now, message=message, reason=reason, level=level)
    if verdict.wait_seconds:
        job.run_after = now + verdict.wait_seconds
    return state


def _losses(session: Session, job: Job) -> int:
    """Return the number of bad ends in a row without a new checkpoint, including the attempt that just ended.

    Counts from the last time a user resumed the job.
    """
    newest = session.scalar(select(func.max(Checkpoint.created_at)).where(Checkpoint.job_id == job.id)) or 0.0
    since = (Attempt.job_id == job.id, Attempt.ended_at > max(newest, job.resumed_at or 0.0))
    since = (*since, Attempt.reason != EndReason.GANG_INCOMPLETE)  # it never trained: ignored, does not break the row
    latest = select(Attempt.reason).where(*since).order_by(Attempt.number.desc()).limit(MAX_LOSSES)
    in_a_row = takewhile(lambda reason: reason in BAD, session.scalars(latest))
    return max(1, sum(1 for _ in in_a_row))


def close_attempt(session: Session, job: Job, *, reason: EndReason, detail: str | None, now: float) -> None:
    """Write the end to the attempt's row."""
    attempt = session.get(Attempt, job.claim_id)
    assert attempt is not None, f"job {job.id} is running without an attempt"
    attempt.ended_at, attempt.reason, attempt.detail = now, reason, detail
    ledger.count(session, "attempts_ended", reason)


def _failed(reason: EndReason, detail: str, error: Json | None) -> Json:
    return {**ErrorText.of(reason.value, detail=detail).as_job_error(), **(error or {})}


def _quarantined(
    session: Session, job: Job, reason: EndReason, detail: str, number: int, *, error: Json | None
) -> Json:
    """The error of a quarantined job. Its evidence lists how and where each of the latest attempts ended.

    error: the error of the last attempt, if any. It contains a remedy, and means that no worker was lost.
    """
    ended = select(Attempt).where(Attempt.job_id == job.id, Attempt.ended_at.is_not(None))
    attempts = session.scalars(ended.order_by(Attempt.number.desc()).limit(number + 2))
    evidence = [
        {
            "attempt": a.number,
            "reason": a.reason,
            "detail": a.detail,
            "worker_id": a.blamed_worker_id or a.worker_id,
            "ended_at": a.ended_at,
        }
        for a in attempts
    ]
    is_smallest = job.counted_attempts >= MAX_COUNTED_ATTEMPTS and failures.num_out_of_memory_at_end(
        session, job, reason
    )
    tried = failures.out_of_memory_text(session, job) if is_smallest else ""
    name = f"quarantined_after_{reason.value}"
    if error is not None and reason is EndReason.INFRA_LOST:
        name = "quarantined_with_damaged_file" if error.get("code") == DAMAGED else "quarantined_after_known_error"
    text = ErrorText.of(name, num_attempts=number, detail=f"{detail} {tried}".strip())
    return {**text.as_job_error(), "evidence": evidence}


def _message(job: Job, verdict: AttemptOutcome, reason: EndReason, detail: str, *, is_loss: bool) -> str:
    why = f"{reason.value.replace('_', ' ')}: {detail}" if detail else reason.value.replace("_", " ")
    match verdict.verb:
        case Verb.FAIL:
            return f"The job failed. {(job.error or {}).get('message', why)}"
        case Verb.APPLY_CANCEL:
            return "The trial was stopped." if reason is EndReason.PRUNED else "The job was cancelled."
        case Verb.APPLY_PAUSE:
            return "The job was paused. It can be resumed where it stopped."
        case Verb.RELEASE if reason is EndReason.PREEMPTED:
            return f"An urgent job preempted this job. It returned to its position in the queue. {detail}".strip()
        case Verb.RELEASE:
            return f"The job returns to the queue ({why}). This attempt does not count as failed."
        case _:
            so_far = f"{verdict.counted_attempts} of {MAX_COUNTED_ATTEMPTS} allowed attempts have failed"
            return (
                f"Attempt {job.attempt} failed ({why}). The job is retried in {verdict.wait_seconds:.0f} s "
                f"from its last checkpoint. {'This attempt does not count as failed' if is_loss else so_far}."
            )
