"""What the leader of a gang does around its trainer: calls the others, starts with all of them, sees when one is gone.

Without a gang each of these does nothing. The claims are the leader's own: nothing here touches a job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress

from catalog import gangs
from catalog.errors import LorryError
from catalog.gangs import NotGathered, Round
from catalog.states import EndReason
from catalog.tables import Job
from worker.bases import Abandoned
from worker.context import WorkerContext
from worker.exits import is_echo
from worker.gang import Seat
from worker.held import End
from worker.launch import TrainerProcess
from worker.meeting import meeting_settings, told_port
from worker.trainer_directory import Json

LOOK_SECONDS = 0.2


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
    members = [member.worker_id for member in called]
    with _tried_later(seat):
        seconds = context.settings.gang_join_seconds
        seat.round = gangs.open_round(seat.place, members=members, task=task, seconds=seconds)
    stack.callback(_let_go, seat)


def meeting(context: WorkerContext) -> Json:
    """What the settings of the leader's trainer say of where it meets the others."""
    seat = context.gang
    if seat is None or (led := seat.round) is None:
        return {}
    where = {"address": seat.address, "interface": seat.interface, "name": led.round_id}
    return {"meeting": meeting_settings(**where, port=None, first_rank=0, num_ranks=led.num_ranks)}


def start(context: WorkerContext, trainer: TrainerProcess, *, is_unwanted: Callable[[], bool]) -> None:
    """Once all have joined and the leader's trainer listens, let all begin. Raises NotGathered where one does not come,
    Abandoned where nobody wants it any more, Unavailable."""
    seat = context.gang
    if seat is None or (led := seat.round) is None:
        return
    context.pulse.guard(on_beat=trainer.pulse, on_lost=trainer.kill)
    try:
        with _tried_later(seat):
            _start(context, seat, led, trainer, is_unwanted)
    finally:
        context.pulse.guard(on_beat=None, on_lost=None)


def _start(
    context: WorkerContext, seat: Seat, led: Round, trainer: TrainerProcess, is_unwanted: Callable[[], bool]
) -> None:
    while True:
        if is_unwanted() or context.draining:
            raise Abandoned
        found = gangs.progress(seat.place, led.round_id)
        hindrance = gangs.hindrance_of(found)
        if hindrance is not None and (found.is_late or found.ended or found.lost or found.is_anyone_leaving):
            raise NotGathered(hindrance)
        port = told_port(trainer.directory)
        if hindrance is None and port is not None:
            gangs.start(seat.place, led.round_id, port=port)
            trainer.started_at = time.monotonic()  # loading begins now
            return
        if trainer.wait(LOOK_SECONDS):
            raise NotGathered(f"The trainer ended with exit status {trainer.returncode}.")


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
        seat.is_broken = True
        trainer.kill()
        return False
    if found.ended or found.lost:
        seat.is_broken = True
        trainer.kill()
    return found.is_anyone_leaving


def cause(context: WorkerContext, end: End, log_tail: str) -> End:
    """How the attempt ended, where it was not by the leader's own trainer, which ended as `end` says. The others are
    waited for: each tells how its part ended, or falls silent. Raises Unavailable."""
    seat = context.gang
    if seat is None or (led := seat.round) is None or not (seat.is_broken or is_echo(end.reason, end.detail, log_tail)):
        return end
    deadline = time.monotonic() + context.settings.lease_seconds + context.settings.heartbeat_seconds
    while time.monotonic() < deadline:
        try:
            found = gangs.progress(seat.place, led.round_id)
        except NotGathered:
            return End(reason=EndReason.INFRA_LOST, detail="The round is over: another worker leads the gang now.")
        if (known := _known(found)) is not None:
            return known
        time.sleep(LOOK_SECONDS)
    return _known_by_none()


def _known(found: gangs.Progress) -> End | None:
    """Who ended by himself comes first, then who has fallen silent; all may have lost each other."""
    for worker_id, told in sorted(found.ended.items()):
        if not told["is_echo"]:
            return End(reason=EndReason(told["reason"]), detail=f"On {worker_id} of the gang: {told['detail']}")
    if found.lost:
        detail = f"Worker {found.lost[0]} of the gang was not heard from any more."
        return End(reason=EndReason.INFRA_LOST, detail=detail)
    return _known_by_none() if len(found.ended) == found.num_others else None


def _known_by_none() -> End:
    return End(reason=EndReason.INFRA_LOST, detail="The workers of the gang lost each other.")


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
