"""What the leader of a gang does around its trainer: calls the others, starts with all of them, sees when one is gone.

Without a gang each of these does nothing. The claims are the leader's own: nothing here touches a job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress

from catalog.errors import LorryError, Unavailable
from catalog.fleet import gangs
from catalog.fleet.gangs import NotGathered, Round
from catalog.states import EndReason
from catalog.tables.jobs import Job
from worker.background.base_models import Abandoned
from worker.context.context import WorkerContext
from worker.context.gang_membership import Seat
from worker.process.clock import boot_seconds
from worker.process.launcher import TrainerProcess
from worker.protocol.mailbox import Json
from worker.protocol.rendezvous import meeting_settings, told_port
from worker.session.failures import own_end
from worker.session.session_job import End
from worker.session.trainer_session import OUTAGES

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.2
ECHO_SECONDS = 20.0
"""A trainer that has lost a process of another node exits within this time.

See lora_core.distributed.failure_broadcast.
"""


def gather(context: WorkerContext, stack: ExitStack, first: Job, settings: Json) -> None:
    """Call those that are there, to be let go with the stack. settings: of the leader's own trainer, but for its base's
    folder. Raises NotGathered, Unavailable."""
    seat = context.gang
    if seat is None:
        return
    with _tried_later(seat):
        called = seat.to_call()
        if len(called) < seat.fewest:
            raise NotGathered(f"{len(called)} of the {seat.fewest} workers that its gang needs are there.")
        if len(called) < 2:
            return
        task: Json = {
            "trainer_id": first.trainer_id,
            "base_model": first.base_model,
            "base_digest": first.base_digest,
            "settings": settings,
            "address": seat.address,
        }
        seat.open(task)
    stack.callback(_let_go, seat)


def meeting(context: WorkerContext) -> Json:
    """What the settings of the leader's trainer say of where it meets the others."""
    seat = context.gang
    if seat is None or (led := seat.round) is None:
        return {}
    where = {"address": seat.address, "interface": seat.interface, "name": led.round_id}
    return {"meeting": meeting_settings(**where, port=None, first_rank=0, num_ranks=led.num_ranks)}


def start(context: WorkerContext, trainer: TrainerProcess, *, is_unwanted: Callable[[], bool]) -> None:
    """Once all have joined and the leader's trainer listens, let all begin. Where that trainer ends, or one of the
    others can't take part, the trainer has ended by then, and `cause` tells why.

    Raises NotGathered where one does not come in time, or goes; Abandoned where nobody wants it any more; Unavailable
    where the database did not answer for so long that the claims were given up, and the trainer with them.
    """
    seat = context.gang
    if seat is None or (led := seat.round) is None:
        return
    context.pulse.guard(on_beat=trainer.pulse, on_lost=trainer.kill)
    try:
        with _tried_later(seat):
            while trainer.returncode is None and not _has_started(context, seat, led, trainer, is_unwanted):
                if trainer.is_killed:
                    break
                trainer.wait(LOOK_SECONDS)
        if context.pulse.lost.is_set():
            message, remedy = "The worker could not reach the database.", "There is nothing to do: it is tried again."
            raise Unavailable(message, code="database_unavailable", remedy=remedy)
    finally:
        context.pulse.guard(on_beat=None, on_lost=None)


def _has_started(
    context: WorkerContext, seat: Seat, led: Round, trainer: TrainerProcess, is_unwanted: Callable[[], bool]
) -> bool:
    if is_unwanted() or context.draining:
        raise Abandoned
    try:
        found = gangs.progress(seat.place, led.round_id)
        if any(told["reason"] != EndReason.DRAINED for told in found.ended.values()):
            seat.wait_a_while()
            _break(seat, trainer)
            return False
        hindrance, port = gangs.hindrance_of(found), told_port(trainer.directory)
        if hindrance is not None and (found.is_late or found.ended or found.lost or found.is_anyone_leaving):
            if found.is_late:
                gangs.missed(seat.place, led.round_id, found.not_joined)
            raise NotGathered(hindrance)
        if hindrance is not None or port is None:
            return False
        gangs.start(seat.place, led.round_id, port=port)
    except OUTAGES as error:
        log.warning("%s The gang is asked again.", error)
        return False  # without an answer for too long the pulse ends the trainer
    seat.has_started = True
    trainer.started_at = time.monotonic()  # loading begins now
    return True


def attend(context: WorkerContext, trainer: TrainerProcess) -> bool:
    """See whether all are there: without one of them the trainer is killed. True where one wants to leave, so that the
    jobs are to be saved. Raises Unavailable."""
    seat = context.gang
    if seat is None or (led := seat.round) is None or not seat.is_look_due():
        return False
    try:
        seat.look()
        found = gangs.progress(seat.place, led.round_id)
    except NotGathered:
        _break(seat, trainer)
        return False
    if found.lost or any(not told["is_echo"] for told in found.ended.values()) or _is_left(seat, found):
        _break(seat, trainer)
    return found.is_anyone_leaving


def _is_left(seat: Seat, found: gangs.RoundState) -> bool:
    """Whether others ended for another's sake some time ago. It may be the leader's own trainer, which is about to end
    as well, and tells more if it does so by itself."""
    if not found.ended:
        return False
    seat.ended_since = seat.ended_since or time.monotonic()
    return time.monotonic() - seat.ended_since >= ECHO_SECONDS


def _break(seat: Seat, trainer: TrainerProcess) -> None:
    seat.is_broken |= trainer.returncode is None
    trainer.kill()


def is_spent(context: WorkerContext) -> bool:
    """Whether a trainer that is empty is of no use any more, for one of its gang takes nothing new."""
    return context.gang is not None and context.gang.round is not None and not context.gang.is_open


def cause(context: WorkerContext, trainer: TrainerProcess, *, is_ready: bool) -> End:
    """How the trainer ended: of a gang by the part that went wrong. Where that was not the leader's own, the others are
    waited for: each tells how its part ended, or falls silent. is_ready: it had loaded its base. Raises Unavailable."""
    seat = context.gang
    led = seat.round if seat is not None else None
    has_met = seat is not None and (seat.has_started or seat.is_broken)
    ranks = range(context.num_processes) if led is not None and has_met else None
    own = own_end(context, trainer, ranks=ranks, was_killed=seat is not None and seat.is_broken)
    log.error("%s\n%s", own.detail, own.log_tail)
    if seat is None or led is None or not own.is_echo:
        blamed = context.worker_id if led is not None and not own.is_of_any else None
        return End(reason=own.reason, detail=own.detail, blamed_worker_id=blamed)
    found: gangs.RoundState | None = None
    deadline = boot_seconds() + context.settings.lease_seconds + context.settings.heartbeat_seconds
    while boot_seconds() < deadline and not context.draining:
        try:
            found = gangs.progress(seat.place, led.round_id)
        except NotGathered:
            return End(reason=EndReason.INFRA_LOST, detail="The round is over: another worker leads the gang now.")
        if (known := _known(found)) is not None:
            return known
        if len(found.ended) == found.num_others:
            break
        time.sleep(LOOK_SECONDS)
    if context.draining:
        return End(reason=EndReason.DRAINED, detail="The worker left.")
    if found is not None and not is_ready and not own.had_met:
        seat.wait_a_while()
        gangs.missed(seat.place, led.round_id, led.workers[1:])
        return End(reason=EndReason.GANG_INCOMPLETE, detail=_unreachable(seat, trainer))
    return End(reason=EndReason.INFRA_LOST, detail=f"The workers of the gang lost each other. {own.detail}")


def _unreachable(seat: Seat, trainer: TrainerProcess) -> str:
    where = f"{seat.address}, port {told_port(trainer.directory)}"
    return (
        "The workers of the gang reach the database, and their trainers did not reach each other. One listened at "
        f"{where}. Let these nodes connect to each other at every port."
    )


def _known(found: gangs.RoundState) -> End | None:
    """Who ended by himself comes first, then who has fallen silent; all may have lost each other."""
    for worker_id, told in sorted(found.ended.items()):
        if not told["is_echo"]:
            detail = f"On {worker_id} of the gang: {told['detail']}"
            return End(reason=_reason(told["reason"]), detail=detail, blamed_worker_id=worker_id)
    if not found.lost:
        return None
    detail = f"Worker {found.lost[0]} of the gang was not heard from any more."
    return End(reason=EndReason.INFRA_LOST, detail=detail, blamed_worker_id=found.lost[0])


def _reason(told: str) -> EndReason:
    """Of a member, whose code may be newer."""
    try:
        return EndReason(told)
    except ValueError:
        return EndReason.INFRA_LOST


@contextmanager
def _tried_later(seat: Seat) -> Generator[None]:
    try:
        yield
    except NotGathered:
        seat.wait_a_while()
        raise


def _let_go(seat: Seat) -> None:
    """Best effort: a round whose leader is gone is over with the next one's lead."""
    led, seat.round, seat.is_broken = seat.round, None, False
    if led is not None:
        with suppress(LorryError):
            gangs.end_round(seat.place, led.round_id)
