"""The supervisor's interface to its gang: a group of workers on several nodes that train the same jobs together.

`WorkerGang` is the interface and its null object: each method suits a worker without a gang. `NodeGang` is for a member
of a gang of nodes. Only the leader claims jobs, so nothing here reads or writes a job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress

from catalog.clock import boot_seconds
from catalog.errors import LorryError, Unavailable
from catalog.fleet import gangs
from catalog.fleet.gangs import NotGathered, Round, RoundState
from catalog.states import EndReason
from catalog.tables.jobs import Job
from worker.background.child_task import Abandoned
from worker.background.task_runner import TaskRunner
from worker.context.context import WorkerContext
from worker.context.gang_membership import GangMembership
from worker.gang import member
from worker.gang.member import Launch
from worker.process.launcher import TrainerProcess
from worker.protocol.mailbox import Json
from worker.protocol.rendezvous import meeting_settings, reported_port
from worker.session.failures import LocalExit, TrainerEnd, local_exit
from worker.session.session_job import End
from worker.session.trainer_session import OUTAGES

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
PEER_FAILURE_SECONDS = 20.0
"""A trainer that has lost a process of another node exits within this time.

See lora_core.distributed.failure_broadcast.
"""


def gang_of(context: WorkerContext) -> WorkerGang:
    return WorkerGang(context) if context.membership is None else NodeGang(context, context.membership)


class WorkerGang:
    """The interface, for a worker without a gang: it never participates, waits for no other worker, and leads no
    round."""

    shutdown_end = TrainerEnd.WORKER_SHUTDOWN
    """How attempts end whose trainer shut down because a worker of the gang does."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context

    def participate(self, tasks: TaskRunner, launch: Launch) -> bool:
        """If another worker leads and calls this one, run this node's part of its trainer until the round is over.

        Returns whether it was called. Raises Unavailable, OutOfSpace, before the part has begun.
        """
        return False

    def may_claim(self) -> bool:
        """Whether this worker may claim jobs now. Raises Unavailable."""
        return True

    def gather(self, stack: ExitStack, first: Job, settings: Json) -> None:
        """Open a round: call the other workers, and release them with the stack.

        settings: of the leader's trainer, except the folder of its base. Raises NotGathered, Unavailable.
        """

    def rendezvous(self) -> Json:
        """Return the settings by which the leader's trainer connects to the trainers of the other nodes."""
        return {}

    def start(self, trainer: TrainerProcess, *, is_unwanted: Callable[[], bool]) -> None:
        """Wait until all workers have joined and the leader's trainer listens; then let all trainers load.

        If the leader's trainer exits, or a member can't take part, the leader's trainer has exited on return, and
        `exit_end` returns the reason. Raises NotGathered if a worker does not join in time, or leaves; Abandoned if all
        jobs were stopped; Unavailable if the claims expired in an outage, and the trainer was killed with them.
        """

    def monitor(self, trainer: TrainerProcess) -> bool:
        """Kill the trainer if a worker of the round is lost.

        Returns whether a worker wants to shut down, so that the jobs must be saved. Raises Unavailable.
        """
        return False

    @property
    def is_open(self) -> bool:
        """Whether the trainer may get new jobs: no worker of its round is cordoned or shutting down."""
        return True

    def exit_end(self, trainer: TrainerProcess, *, is_ready: bool) -> End:
        """Return how the attempts end after the trainer has exited on its own. is_ready: it had loaded its base model.

        In a round, the worker whose trainer failed first decides. Raises Unavailable.
        """
        local = local_exit(self._context, trainer)
        return End(reason=local.reason, detail=local.detail)


class NodeGang(WorkerGang):
    """For a member of a gang of several nodes, which leads rounds or participates in them.

    A round has at least two workers. Between rounds, and if no other worker is present, it acts like a worker without a
    gang.
    """

    shutdown_end = TrainerEnd.GANG_SHUTDOWN

    def __init__(self, context: WorkerContext, membership: GangMembership) -> None:
        super().__init__(context)
        self._membership = membership

    def participate(self, tasks: TaskRunner, launch: Launch) -> bool:
        return member.participate(self._context, self._membership, tasks, launch)

    def may_claim(self) -> bool:
        return self._membership.may_claim()

    def gather(self, stack: ExitStack, first: Job, settings: Json) -> None:
        membership = self._membership
        with _waiting_after_failure(membership):
            called = membership.to_call()
            if len(called) < membership.fewest:
                gang, fewest = membership.member.gang, membership.fewest
                raise NotGathered("gang_too_few_workers", gang=gang, fewest=fewest, num_present=len(called))
            if len(called) < 2:
                return
            task: Json = {
                "trainer_id": first.trainer_id,
                "base_model": first.base_model,
                "base_digest": first.base_digest,
                "settings": settings,
                "address": membership.address,
            }
            membership.open(task)
        stack.callback(self._close_round)

    def _close_round(self) -> None:
        """End the round if possible. If the database is unavailable, it ends when another worker takes the lead."""
        led, self._membership.round, self._membership.is_broken = self._membership.round, None, False
        if led is not None:
            with suppress(LorryError):
                gangs.end_round(self._membership.member, led.round_id)

    def rendezvous(self) -> Json:
        membership = self._membership
        if (led := membership.round) is None:
            return {}
        endpoint = {"address": membership.address, "interface": membership.interface, "name": led.round_id}
        return {"meeting": meeting_settings(**endpoint, port=None, first_rank=0, num_ranks=led.num_ranks)}

    def start(self, trainer: TrainerProcess, *, is_unwanted: Callable[[], bool]) -> None:
        heartbeat = self._context.heartbeat
        if (led := self._membership.round) is None:
            return
        heartbeat.guard(on_beat=trainer.send_heartbeat, on_lost=trainer.kill)
        try:
            with _waiting_after_failure(self._membership):
                while trainer.returncode is None and not self._has_started(led, trainer, is_unwanted):
                    if trainer.is_killed:
                        break
                    trainer.wait(POLL_SECONDS)
            if heartbeat.lost.is_set():
                worker_id = self._context.worker_id
                raise Unavailable("database_unreachable_for_gang", worker_id=worker_id)
        finally:
            heartbeat.guard(on_beat=None, on_lost=None)

    def _has_started(self, led: Round, trainer: TrainerProcess, is_unwanted: Callable[[], bool]) -> bool:
        """Poll once. Returns whether all have joined and may load now."""
        membership = self._membership
        if is_unwanted() or self._context.draining:
            raise Abandoned
        try:
            found = gangs.progress(membership.member, led.round_id)
            if any(ended["reason"] != EndReason.DRAINED for ended in found.ended.values()):
                membership.back_off()
                self._break(trainer)
                return False
            problem, port = gangs.hindrance_of(found), reported_port(trainer.directory)
            if problem is not None and (found.is_late or found.ended or found.lost or found.is_anyone_leaving):
                if found.is_late:
                    gangs.missed(membership.member, led.round_id, found.not_joined)
                raise gangs.hindered(membership.member.gang, problem, found)
            if problem is not None or port is None:
                return False
            gangs.start(membership.member, led.round_id, port=port)
        except OUTAGES as error:
            log.warning("%s The gang is polled again.", error)
            return False  # if the outage lasts too long, the heartbeat kills the trainer
        membership.has_started = True
        trainer.started_at = time.monotonic()  # loading begins now
        return True

    def monitor(self, trainer: TrainerProcess) -> bool:
        membership = self._membership
        if (led := membership.round) is None or not membership.is_poll_due():
            return False
        try:
            membership.poll()
            found = gangs.progress(membership.member, led.round_id)
        except NotGathered:
            self._break(trainer)
            return False
        has_failed = any(not ended["is_echo"] for ended in found.ended.values())
        if found.lost or has_failed or self._has_outlived_peers(found):
            self._break(trainer)
        return found.is_anyone_leaving

    def _has_outlived_peers(self, found: RoundState) -> bool:
        """Return whether members exited long ago, each because of a failure elsewhere.

        The leader's own trainer may be the one that failed. It gets some time to exit, because its own exit shows more
        than that of a killed trainer.
        """
        membership = self._membership
        if not found.ended:
            return False
        membership.ended_since = membership.ended_since or time.monotonic()
        return time.monotonic() - membership.ended_since >= PEER_FAILURE_SECONDS

    def _break(self, trainer: TrainerProcess) -> None:
        """Kill the trainer because of another node. Its exit status is then meaningless."""
        self._membership.is_broken |= trainer.returncode is None
        trainer.kill()

    @property
    def is_open(self) -> bool:
        return self._membership.is_open

    def exit_end(self, trainer: TrainerProcess, *, is_ready: bool) -> End:
        membership, context = self._membership, self._context
        if (led := membership.round) is None:
            return super().exit_end(trainer, is_ready=is_ready)
        has_connected = membership.has_started or membership.is_broken
        ranks = range(context.num_processes) if has_connected else None
        local = local_exit(context, trainer, ranks=ranks, was_killed=membership.is_broken)
        if local.is_echo:
            try:
                return self._peer_end(led, trainer, local, is_ready=is_ready)
            except NotGathered:
                return End(reason=EndReason.INFRA_LOST, detail="Another worker became the leader of the gang.")
        blamed = None if local.is_of_any else context.worker_id
        return End(reason=local.reason, detail=local.detail, blamed_worker_id=blamed)

    def _peer_end(self, led: Round, trainer: TrainerProcess, local: LocalExit, *, is_ready: bool) -> End:
        """Return how the attempts end if another node made the leader's trainer exit. Raises NotGathered,
        Unavailable."""
        membership = self._membership
        found = self._wait_for_members(led)
        if found is not None and (failure := _failure_in(found)) is not None:
            return failure
        if self._context.draining:
            return TrainerEnd.WORKER_SHUTDOWN.value
        if found is not None and not is_ready and not local.had_connected:
            membership.back_off()
            gangs.missed(membership.member, led.round_id, led.workers[1:])
            endpoint = f"{membership.address}, port {reported_port(trainer.directory)}"
            detail = (
                "The workers of the gang reach the database, but their trainers did not reach each other. The leader's "
                f"trainer listened on {endpoint}. Allow connections between these nodes on all ports."
            )
            return End(reason=EndReason.GANG_INCOMPLETE, detail=detail)
        return End(reason=EndReason.INFRA_LOST, detail=f"The workers of the gang lost their connection. {local.detail}")

    def _wait_for_members(self, led: Round) -> RoundState | None:
        """Wait until a member has failed, or all have reported how their parts ended, or for a lease and a heartbeat.

        A failed member either reports it, or its heartbeat stops. Raises NotGathered, Unavailable.
        """
        settings = self._context.settings
        found: RoundState | None = None
        deadline = boot_seconds() + settings.lease_seconds + settings.heartbeat_seconds
        while boot_seconds() < deadline and not self._context.draining:
            found = gangs.progress(self._membership.member, led.round_id)
            if _failure_in(found) is not None or len(found.ended) == found.num_others:
                break
            time.sleep(POLL_SECONDS)
        return found


def _failure_in(found: RoundState) -> End | None:
    """Return the failure of a member: the one that it reported, or else its missing heartbeats. None if the members
    have only reported lost connections so far."""
    for worker_id, ended in sorted(found.ended.items()):
        if not ended["is_echo"]:
            detail = f"On {worker_id} of the gang: {ended['detail']}"
            return End(reason=_reason(ended["reason"]), detail=detail, blamed_worker_id=worker_id)
    if not found.lost:
        return None
    detail = f"Worker {found.lost[0]} of the gang stopped sending heartbeats."
    return End(reason=EndReason.INFRA_LOST, detail=detail, blamed_worker_id=found.lost[0])


def _reason(name: str) -> EndReason:
    """Parse a reason. A member with newer code may report one that this worker does not know."""
    try:
        return EndReason(name)
    except ValueError:
        return EndReason.INFRA_LOST


@contextmanager
def _waiting_after_failure(membership: GangMembership) -> Generator[None]:
    """Claim nothing for a while if no round was formed: the worker at fault may be gone before the next round."""
    try:
        yield
    except NotGathered:
        membership.back_off()
        raise
