"""The warm standby: while a worker has no trainer, it keeps a process that has already imported the slow libraries.

The process waits for the settings in its directory. It holds no claim and no data of a job, so it may exit at any time;
the next trainer then starts without it. This module contains both ends, so that they agree.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from catalog.errors import OutOfSpace
from lorry.local.parent_watch import LOST_PARENT
from worker.node import devices, scratch_dirs
from worker.process import confined_child
from worker.process.launcher import TrainerProcess, launch
from worker.protocol.errors import print_handled
from worker.protocol.mailbox import EventWriter, TrainerDirectory

log = logging.getLogger(__name__)
POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class StandbyTrainer:
    process: TrainerProcess
    folder: ExitStack
    """Owns the process's directory."""


class Standby:
    """The worker's end. At most one process waits."""

    def __init__(
        self,
        trainers_dir: Path,
        device: devices.Device,
        *,
        silence_seconds: float,
        bases_dir: Path,
        num_processes: int = 1,
        in_gang: bool = False,
    ) -> None:
        self._trainers_dir = trainers_dir
        self._device = device
        self._silence_seconds = silence_seconds
        self._bases_dir = bases_dir
        self._num_processes = num_processes
        self._in_gang = in_gang
        self._waiting: StandbyTrainer | None = None
        self._is_given_up = False

    def prepare(self) -> None:
        """Start a process if none waits. Call it from a thread that outlives the trainer. Never raises.

        If the process failed, or could not be started, this is logged once and not retried before the next trainer
        starts. A process that exited because it got no heartbeat, for example while its worker was stopped, has not
        failed.
        """
        if self._waiting is not None and (status := self._waiting.process.returncode) is not None:
            if status != LOST_PARENT:
                log.warning("The standby trainer has exited.\n%s", self._waiting.process.directory.log_tail())
                self._is_given_up = True
            self.close()
        if self._waiting is not None or self._is_given_up:
            return
        with ExitStack() as folder:
            try:
                path = folder.enter_context(scratch_dirs.owned(self._trainers_dir / f"standby-{secrets.token_hex(6)}"))
                process = launch(
                    TrainerDirectory.create(path),
                    self._device,
                    silence_seconds=self._silence_seconds,
                    bases_dir=self._bases_dir,
                    num_processes=self._num_processes,
                    in_gang=self._in_gang,
                )
            except (OSError, OutOfSpace) as error:
                log.warning("No standby trainer could be started: %s", error)
                self._is_given_up = True
            else:
                self._waiting = StandbyTrainer(process=process, folder=folder.pop_all())

    def send_heartbeat(self) -> None:
        """Show the waiting process that its worker lives. Never blocks."""
        if (waiting := self._waiting) is not None:
            waiting.process.send_heartbeat()

    def memory_bytes(self) -> int:
        """Return the memory of the waiting process, which it keeps when it becomes a trainer."""
        return self._waiting.process.memory_bytes() if self._waiting is not None else 0

    def take(self, stack: ExitStack) -> TrainerProcess | None:
        """Return the waiting process if it still runs. From now on, the stack kills it and deletes its directory."""
        self._is_given_up = False
        waiting = self._waiting
        if waiting is None or waiting.process.returncode is not None:
            self.close()
            return None
        self._waiting = None
        waiting.process.send_heartbeat()  # the next one follows only when the worker's heartbeat guards it
        stack.push(waiting.folder)
        stack.callback(waiting.process.close)
        return waiting.process

    def close(self) -> None:
        """Kill the waiting process and delete its directory."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.process.close()
            waiting.folder.close()


def stand_by(directory: TrainerDirectory, warm_up: Callable[[Path], None]) -> None:
    """The trainer's end: load what every trainer needs, report this, and wait for the settings.

    Without settings, only a trainer on a CPU warms up: no GPU is used before there is a job for it.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        try:
            warm_up(directory.path / f"warm-up-{os.environ.get('LOCAL_RANK', '0')}")
        except Exception as error:  # noqa: BLE001  (a lasting error recurs with a real base model and is reported then)
            print_handled(error)
    if confined_child.is_first():
        events = EventWriter(directory)
        events.write({"type": "standing_by"})
        events.close()
    while not directory.has_begun():
        time.sleep(POLL_SECONDS)
