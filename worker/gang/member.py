"""Runs a gang member that is not the leader: its devices work for the leader's trainer.

A member has no claim, and writes nothing about a job except the output of its trainer. Its trainer is one of several
that train together. It ends with the round, or when this worker can't reach the database any more. The member reads
from the database which jobs its trainer trains. It polls at intervals. Therefore a job's log may begin one poll before
the job joined, and end one poll after the job left.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from catalog import logs
from catalog.clock import boot_seconds
from catalog.errors import LorryError
from catalog.fleet import gangs
from catalog.fleet.gangs import Call, NotGathered
from catalog.history import job_logs
from catalog.queue.claiming import Claim
from catalog.states import EndReason
from catalog.tables.history import Attempt
from catalog.tables.jobs import Job
from worker.background import base_models
from worker.background.child_task import Abandoned
from worker.background.task_runner import TaskRunner
from worker.context.context import WorkerContext
from worker.context.gang_membership import GangMembership
from worker.process import exit_status
from worker.process.launcher import TrainerProcess
from worker.protocol.mailbox import Json
from worker.protocol.rendezvous import meeting_settings
from worker.session.failures import LocalExit, TrainerEnd, launch_failure, local_exit
from worker.session.job_logs import Output
from worker.session.session_job import End
from worker.session.trainer_session import OUTAGES
from worker.session.watchdog import cordon_if_unkillable

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
Launch = Callable[[WorkerContext, ExitStack, str, Json], TrainerProcess]
"""Launches a trainer with this id and these settings. It is killed with the stack."""
LOG_POLL_SECONDS = 10.0
"""Between two queries for the jobs whose logs get the output."""


def participate(context: WorkerContext, membership: GangMembership, tasks: TaskRunner, launch: Launch) -> bool:
    """See `WorkerGang.participate`."""
    _report_end(membership)
    if (call := membership.called()) is None:
        return False
    membership.last_round_id = call.round_id
    with logs.about({"trainer": call.task["trainer_id"]}), ExitStack() as stack:
        membership.unreported_end = _Participation(context, tasks, membership, call).run(stack, launch)
        with suppress(LorryError):
            _report_end(membership)  # if it fails, the next call of `participate` repeats it
    return True


def _report_end(membership: GangMembership) -> None:
    """Record how this member's last part ended, unless it is recorded: the leader waits for it. Raises Unavailable,
    OutOfSpace."""
    if membership.unreported_end is not None and membership.last_round_id is not None:
        gangs.leave(membership.member, membership.last_round_id, end=membership.unreported_end)
        membership.unreported_end = None


class _Participation:
    """One member's part in one round."""

    def __init__(self, context: WorkerContext, tasks: TaskRunner, membership: GangMembership, call: Call) -> None:
        self._context = context
        self._tasks = tasks
        self._membership = membership
        self._call = call

    def run(self, stack: ExitStack, launch: Launch) -> Json | None:
        """Take part. Returns how the part ended, or None if the leader decides that.

        The output of the trainer is stored when the stack ends, so the leader does not wait for the store.
        """
        context, task = self._context, self._call.task
        try:
            # An import that takes longer than this round serves the next one.
            base_dir = base_models.ensure(context, task["base_model"], task["base_digest"])
            self._join()
            port = self._wait_for_start()
            return None if port is None else self._train(stack, launch, self._settings(port, base_dir))
        except NotGathered as error:
            log.info("%s", error.message)
            return None
        except Abandoned:
            return _as_json(TrainerEnd.WORKER_SHUTDOWN.value) if context.draining else None
        except (LorryError, OSError) as error:
            return _as_json(launch_failure(error))

    def _join(self) -> None:
        """Report that this member is ready, and repeat it in an outage. Raises NotGathered."""
        while self._is_called():
            try:
                return gangs.join(self._membership.member, self._call.round_id)
            except OUTAGES as error:
                log.warning("%s The worker will retry to join its gang.", error)
                self._tasks.advance()
                time.sleep(POLL_SECONDS)
        return None

    def _is_called(self) -> bool:
        return self._membership.still_called(self._call.round_id) is not None

    def _wait_for_start(self) -> int | None:
        """Wait until all have joined. Returns the port of the leader's trainer, or None if the round is over."""
        while (found := self._membership.still_called(self._call.round_id)) is not None:
            if found.port is not None:
                return found.port
            if self._context.draining:
                raise Abandoned
            self._tasks.advance()
            time.sleep(POLL_SECONDS)
        return None

    def _settings(self, port: int, base_dir: Path) -> Json:
        """Return the settings of the leader's trainer, adapted to this node."""
        call, task = self._call, self._call.task
        rendezvous = meeting_settings(
            address=task["address"],
            interface=self._membership.interface,
            port=port,
            name=call.round_id,
            first_rank=call.first_rank,
            num_ranks=task["num_ranks"],
        )
        own = {"base_dir": str(base_dir.absolute()), "device": self._context.device.torch_name()}
        return {**task["settings"], **own, "meeting": rendezvous}

    def _train(self, stack: ExitStack, launch: Launch, settings: Json) -> Json | None:
        """Run the trainer until it exits. Its folder's name is unique even if the leader uses the same disk."""
        context, first_rank, trainer_id = self._context, self._call.first_rank, self._call.task["trainer_id"]
        trainer = launch(context, stack, f"{trainer_id}-from-{first_rank}", settings)
        output = MemberOutput(context, trainer, trainer_id=trainer_id, first_rank=first_rank)
        stack.callback(output.end)
        stack.callback(context.heartbeat.guard, on_beat=None, on_lost=None)
        context.heartbeat.guard(on_beat=trainer.send_heartbeat, on_lost=None)
        trainer.send_heartbeat()
        end = self._attend(trainer, output)
        while trainer.is_killed and trainer.is_awaited:
            time.sleep(POLL_SECONDS)
        self._cordon_if_unkillable(trainer)
        return _as_json(TrainerEnd.UNKILLABLE.value) if trainer.is_left_behind else end

    def _cordon_if_unkillable(self, trainer: TrainerProcess) -> None:
        """Cordon the worker if its trainer could not be killed. Retried for the length of a lease, because this worker
        must not be called again."""
        deadline = boot_seconds() + self._context.settings.lease_seconds
        while True:
            try:
                return cordon_if_unkillable(self._context, trainer)
            except OUTAGES as error:
                log.warning("%s Waiting to cordon the worker.", error)
                if boot_seconds() >= deadline:
                    return None
            time.sleep(POLL_SECONDS)

    def _attend(self, trainer: TrainerProcess, output: MemberOutput) -> Json | None:
        context, draining_since, has_requested = self._context, None, False
        while trainer.returncode is None:
            self._tasks.advance()
            if context.draining:
                draining_since = draining_since or time.monotonic()
                has_requested = has_requested or self._request_shutdown()
            limit = context.drain_limit_seconds + POLL_SECONDS
            if draining_since is not None and time.monotonic() - draining_since > limit:
                trainer.kill()
                return _as_json(TrainerEnd.WORKER_SHUTDOWN.value)
            if not self._is_called():
                output.ask_stacks()
                trainer.kill()
                return None
            trainer.wait(POLL_SECONDS)
            output.push_due()
        if trainer.returncode == 0:
            return None
        first = self._call.first_rank
        local = local_exit(context, trainer, ranks=range(first, first + context.num_processes))
        return _as_json(local, is_echo=local.is_echo or local.is_of_any)

    def _request_shutdown(self) -> bool:
        """Record that this worker wants to shut down. Returns whether it is recorded, so that the leader will see
        it."""
        try:
            gangs.ask_to_leave(self._membership.member)
        except OUTAGES:
            return False
        return True


def _as_json(end: End | LocalExit, *, is_echo: bool = False) -> Json:
    """Return how a part ended, as the leader reads it. is_echo: a failure on another node may have caused it."""
    return {"reason": end.reason.value, "detail": end.detail, "is_echo": is_echo}


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
            self._next_poll_at = time.monotonic() + LOG_POLL_SECONDS
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
