"""A trainer on record from its start to its end, and its worker's heartbeat, by which it lives."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from catalog.errors import LorryError
from catalog.fleet import workers
from worker.context.context import WorkerContext
from worker.process.launcher import TrainerProcess
from worker.protocol.mailbox import Json
from worker.session.trainer_session import Pack

log = logging.getLogger(__name__)


@contextmanager
def announced(context: WorkerContext, trainer: TrainerProcess, pack: Pack, base_digest: str) -> Generator[None]:
    """The trainer is on record, and lives by the worker's heartbeat."""
    trainer_id, pack_key = pack.trainer_id, pack.pack_key
    named = {"trainer_id": trainer_id, "worker_id": context.worker_id, "base_digest": base_digest}
    workers.register_trainer(context.db, **named, pack_key=pack_key, report=_group(context))
    context.pulse.status |= {"resident_base": base_digest, "trainer_id": trainer_id, "report": {}}
    context.pulse.guard(on_beat=trainer.pulse, on_lost=trainer.kill)
    try:
        yield
    finally:
        context.pulse.guard(on_beat=None, on_lost=None)
        context.pulse.status |= {"resident_base": None, "trainer_id": None}
        exit_report = {"exit_status": trainer.returncode, **_speeds(context)}
        try:
            workers.end_trainer(context.db, trainer_id, report=exit_report)
        except LorryError as error:  # it is on record as one whose worker knows no more of it
            log.warning("Not recorded: %s", error)


def _group(context: WorkerContext) -> Json:
    """The devices that it has, and the workers of the gang that lend theirs."""
    device = context.device.as_json()
    group = {"group": {name: device[name] for name in ("indices", "cores")}}
    if context.gang is None or context.gang.round is None:
        return group
    return group | {"gang": {"name": context.gang.place.gang, "workers": context.gang.round.workers}}


def _speeds(context: WorkerContext) -> Json:
    """What the trainer has learnt of its ticks: for plans of jobs on its base."""
    told = context.pulse.status["report"].get("tick_speeds")
    return {"tick_speeds": told} if told else {}
