"""What a member of a gang does that is called: it lends its devices to a trainer of the leader's, until that is over.

It has no claim and writes nothing of a job but what its trainer prints. That trainer is one of several that are one
together: when this worker can't ask the database any more, or the round is over, it ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from catalog import logs
from catalog.errors import LorryError
from catalog.fleet import gangs
from catalog.fleet.gangs import Call, NotGathered
from catalog.states import EndReason
from worker.background import base_models
from worker.background.chores import Chores
from worker.context.context import WorkerContext
from worker.context.gang_membership import Seat
from worker.gang.member_logs import LentOutput
from worker.process.clock import boot_seconds
from worker.process.launcher import TrainerProcess
from worker.protocol.mailbox import Json
from worker.protocol.rendezvous import meeting_settings
from worker.session.failures import mishap, own_end
from worker.session.trainer_session import OUTAGES
from worker.session.watchdog import LEFT_BEHIND, set_aside

log = logging.getLogger(__name__)
TURN_SECONDS = 0.2
Start = Callable[[WorkerContext, ExitStack, str, Json], TrainerProcess]
"""By its id and settings; the trainer ends with the stack."""


def lend(context: WorkerContext, chores: Chores, start: Start) -> bool:
    """Take part where the worker is called. False where it is not. Raises Unavailable before anything has begun."""
    seat = context.gang
    if seat is None:
        return False
    _tell(seat)
    if (call := seat.called()) is None:
        return False
    seat.had = call.round_id
    with logs.about({"trainer": call.task["trainer_id"]}), ExitStack() as stack:
        seat.owed = _Part(context, chores, seat, call).take(stack, start)
        with suppress(LorryError):
            _tell(seat)  # else the next turn does
    return True


def _tell(seat: Seat) -> None:
    """How its last part ended, where nobody knows yet. The leader waits for it. Raises Unavailable, OutOfSpace."""
    if seat.owed is not None and seat.had is not None:
        gangs.leave(seat.place, seat.had, end=seat.owed)
        seat.owed = None


class _Part:
    """Of one member in one round."""

    def __init__(self, context: WorkerContext, chores: Chores, seat: Seat, call: Call) -> None:
        self._context = context
        self._chores = chores
        self._seat = seat
        self._call = call

    def take(self, stack: ExitStack, start: Start) -> Json | None:
        """How the part ended; None where that is the leader's to say. What it printed is kept as the stack ends: the
        leader, who waits to be told of the end, waits for no store."""
        context, task = self._context, self._call.task
        try:
            base_dir = base_models.ensure(
                context, task["base_model"], task["base_digest"]
            )  # for the next round, if not this
            self._join()
            port = self._started()
            return None if port is None else self._lend(stack, start, self._settings(port, base_dir))
        except NotGathered as error:
            log.info("%s", error.message)
            return None
        except (LorryError, OSError, base_models.Abandoned) as error:
            return _mishap(context, error)

    def _join(self) -> None:
        """Said until it is heard, while the others wait for it. Raises NotGathered."""
        while self._is_called():
            try:
                return gangs.join(self._seat.place, self._call.round_id)
            except OUTAGES as error:
                log.warning("%s The worker joins its gang a little later.", error)
                self._chores.go_on()
                time.sleep(TURN_SECONDS)
        return None

    def _is_called(self) -> bool:
        return self._seat.still_called(self._call.round_id) is not None

    def _started(self) -> int | None:
        """Wait until all have joined, and the leader's trainer listens. None where the round is over before."""
        while (found := self._seat.still_called(self._call.round_id)) is not None:
            if found.port is not None:
                return found.port
            if self._context.draining:
                raise base_models.Abandoned
            self._chores.go_on()
            time.sleep(TURN_SECONDS)
        return None

    def _settings(self, port: int, base_dir: Path) -> Json:
        """The leader's, with what is this node's own."""
        call, task = self._call, self._call.task
        met = meeting_settings(
            address=task["address"],
            interface=self._seat.interface,
            port=port,
            name=call.round_id,
            first_rank=call.first_rank,
            num_ranks=task["num_ranks"],
        )
        own = {"base_dir": str(base_dir.absolute()), "device": self._context.device.torch_name()}
        return {**task["settings"], **own, "meeting": met}

    def _lend(self, stack: ExitStack, start: Start, settings: Json) -> Json | None:
        """Until the trainer has ended. Its folder is no other's, though the leader's be on the same disk."""
        context, first_rank, trainer_id = self._context, self._call.first_rank, self._call.task["trainer_id"]
        trainer = start(context, stack, f"{trainer_id}-from-{first_rank}", settings)
        output = LentOutput(context, trainer, trainer_id=trainer_id, first_rank=first_rank)
        stack.callback(output.end)
        stack.callback(context.pulse.guard, on_beat=None, on_lost=None)
        context.pulse.guard(on_beat=trainer.pulse, on_lost=None)
        trainer.pulse()
        end = self._attend(trainer, output)
        while trainer.is_killed and trainer.is_awaited:
            time.sleep(TURN_SECONDS)
        self._set_aside(trainer)
        return _told(LEFT_BEHIND.reason, LEFT_BEHIND.detail) if trainer.is_left_behind else end

    def _set_aside(self, trainer: TrainerProcess) -> None:
        """Tried for a lease: with a trainer that no signal ends, it must not be called again."""
        deadline = boot_seconds() + self._context.settings.lease_seconds
        while True:
            try:
                return set_aside(self._context, trainer)
            except OUTAGES as error:
                log.warning("%s Waiting to record that the worker takes nothing new.", error)
                if boot_seconds() >= deadline:
                    return None
            time.sleep(TURN_SECONDS)

    def _attend(self, trainer: TrainerProcess, output: LentOutput) -> Json | None:
        context, leaving_at, has_asked = self._context, None, False
        while trainer.returncode is None:
            self._chores.go_on()
            if context.draining:
                leaving_at = leaving_at or time.monotonic()
                has_asked = has_asked or self._ask_to_leave()
            if leaving_at is not None and time.monotonic() - leaving_at > context.drain_seconds + TURN_SECONDS:
                trainer.kill()
                return _told(EndReason.DRAINED, "The worker left.")
            if not self._is_called():
                output.ask_stacks()
                trainer.kill()
                return None
            trainer.wait(TURN_SECONDS)
            output.push_due()
        return None if trainer.returncode == 0 else self._ended(trainer)

    def _ask_to_leave(self) -> bool:
        """Whether the leader can know now."""
        try:
            gangs.ask_to_leave(self._seat.place)
        except OUTAGES:
            return False
        return True

    def _ended(self, trainer: TrainerProcess) -> Json:
        first = self._call.first_rank
        own = own_end(self._context, trainer, ranks=range(first, first + self._context.num_processes))
        log.error("%s\n%s", own.detail, own.log_tail)
        return _told(own.reason, own.detail, is_echo=own.is_echo or own.is_of_any)


def _mishap(context: WorkerContext, error: LorryError | OSError | base_models.Abandoned) -> Json | None:
    """Why it does not take part."""
    if isinstance(error, base_models.Abandoned):
        return _told(EndReason.DRAINED, "The worker left.") if context.draining else None
    end = mishap(error)
    return _told(end.reason, end.detail)


def _told(reason: EndReason, detail: str, *, is_echo: bool = False) -> Json:
    return {"reason": reason.value, "detail": detail, "is_echo": is_echo}
