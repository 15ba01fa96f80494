"""Stores the output of a member's trainer in the logs of the jobs that it trains, as on the leader's node.

A member holds no claim, so it reads from the database which jobs those are. It polls at intervals. Therefore a job's
log may begin one poll before the job joined, and end one poll after the job left.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from catalog.history import job_logs
from catalog.queue.claiming import Claim
from catalog.states import EndReason
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from worker.context.context import WorkerContext
from worker.process import exit_status
from worker.process.launcher import TrainerProcess
from worker.session.job_logs import Output
from worker.session.trainer_session import OUTAGES

log = logging.getLogger(__name__)
POLL_SECONDS = 10.0


class MemberOutput:
    """The output of one member's part in one round."""

    def __init__(self, context: WorkerContext, trainer: TrainerProcess, *, trainer_id: str, first_rank: int) -> None:
        """trainer_id: the leader's trainer, which identifies the attempts."""
        self._context = context
        self._trainer = trainer
        self._trainer_id = trainer_id
        self._output = Output(context, trainer.directory, first_rank=first_rank)
        self._seen: Mapping[int, int] = trainer.directory.log_starts
        """The end of each file at the last poll."""
        self._begun: set[str] = set()
        """Claims whose output is being stored."""
        self._over: set[str] = set()
        """Claims whose last output is stored, and which the database query still returns."""
        self._ended_after = 0.0
        """Attempts that ended before this time, by the database's clock, have been handled."""
        self._next_poll_at = 0.0

    def push_due(self) -> None:
        """At intervals, find the jobs that have joined or left, store the new output, and truncate long files."""
        if time.monotonic() >= self._next_poll_at:
            self._next_poll_at = time.monotonic() + POLL_SECONDS
            self._poll()
        self._output.push_due()

    def end(self) -> None:
        """Store the last output at the end of the part."""
        self._poll()
        for claim_id in self._begun:
            self._output.end(claim_id)

    def ask_stacks(self) -> None:
        """Dump the stacks of this trainer if the leader's trainer was killed because it hung."""
        timed_out = [attempt for attempt, _ in self._attempts() or () if attempt.reason == EndReason.TIMEOUT]
        if timed_out:
            exit_status.dump_stacks(self._trainer, f"On the leader's node: {timed_out[0].detail}")

    def _poll(self) -> None:
        now, found = self._output.ends(), self._attempts()
        if found is None:
            return
        for attempt, job in found:
            if attempt.claim_id not in self._begun | self._over:
                self._begun.add(attempt.claim_id)
                self._output.begin_at(_claim(attempt, job), self._seen, worker_id=attempt.worker_id)
            is_over = attempt.ended_at is not None and attempt.reason != EndReason.TIMEOUT  # else stacks follow
            if is_over:
                self._output.end(attempt.claim_id)
                self._begun.discard(attempt.claim_id)
                self._over.add(attempt.claim_id)
        self._over &= {attempt.claim_id for attempt, _ in found}
        self._seen = now

    def _attempts(self) -> list[tuple[Attempt, Job]] | None:
        """Return the attempts with their jobs. None in an outage: no training waits for logs."""
        try:
            found, now = job_logs.attempts_of(self._context.db, self._trainer_id, ended_after=self._ended_after)
        except OUTAGES as error:
            log.warning("%s The output of the trainer is stored later.", error)
            return None
        self._ended_after = max(self._ended_after, now - job_logs.LATE_SECONDS)
        return found


def _claim(attempt: Attempt, job: Job) -> Claim:
    """Return the leader's claim."""
    claim_id, began = attempt.claim_id, attempt.started_at
    return Claim(job=job, claim_id=claim_id, attempt=attempt.number, waited_since=began, resume_candidates=())
