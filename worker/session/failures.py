"""How a trainer ended, or of one of several nodes the part here: from what its worker can see of it."""

from __future__ import annotations

from dataclasses import dataclass

from catalog.states import EndReason
from worker.context.context import WorkerContext
from worker.node import cgroup, devices
from worker.process.exit_status import heard, without_others
from worker.process.exits import DIFFER, classify_exit
from worker.process.launcher import TrainerProcess
from worker.protocol.handled import without_handled

LOG_BYTES = 16_000
"""Of each process's last words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnEnd:
    reason: EndReason
    detail: str
    log_tail: str
    is_echo: bool = False
    """It followed from another node's end, or nothing tells that it did not."""
    is_of_any: bool = False
    """It may be any node's doing, for all of them end so."""
    had_met: bool = True
    """Of an echo: the processes of all nodes had, as far as is known."""


def own_end(
    context: WorkerContext, trainer: TrainerProcess, *, ranks: range | None = None, was_killed: bool = False
) -> OwnEnd:
    """ranks: the numbers of the processes here, where others are on other nodes. was_killed: by its worker, for what
    another one was seen to do, so its status tells nothing."""
    is_disk_full = devices.is_disk_full(trainer.directory.path)
    log_tail = without_handled(trainer.directory.log_tail(LOG_BYTES))
    returncode = trainer.returncode or 0
    if ranks is not None:
        logs = [without_handled(log) for log in trainer.directory.log_tails(LOG_BYTES)]
        told = heard(logs, ranks=ranks, returncode=None if was_killed else returncode)
        if told.is_echo or not (told.is_own or is_disk_full):
            detail = f"It ended with others of its gang. {told.said}".strip()
            lost = EndReason.INFRA_LOST
            return OwnEnd(reason=lost, detail=detail, log_tail=log_tail, is_echo=True, had_met=told.is_told)
    reason, detail = classify_exit(
        1 if was_killed else returncode,
        log_tail if ranks is None else without_others(log_tail, ranks),
        num_oom_kills=cgroup.oom_kills() - trainer.oom_kills_before,
        device_kind=context.device.kind,
        is_disk_full=is_disk_full,
    )
    return OwnEnd(reason=reason, detail=detail, log_tail=log_tail, is_of_any=DIFFER.search(log_tail) is not None)
