"""A trainer ahead of its job: a worker that has none keeps one that has imported what takes seconds.

It waits for its directory's settings, holds no claim and nothing of anybody's, so it may end at any moment: then the
next trainer starts as it would have without. Both ends are here, so that they agree.
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
LOOK_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class StandbyTrainer:
    process: TrainerProcess
    folder: ExitStack
    """Owns the process's directory."""


class Standby:
    """The worker's end: at most one process waits."""

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
        """Have one wait. Call it from a thread that outlives the trainer. It never raises: one that failed, or could
        not be started, is told once and not tried again before the next trainer was. One that missed its worker while
        that was stopped has not failed."""
        if self._waiting is not None and (status := self._waiting.process.returncode) is not None:
            if status != LOST_PARENT:
                log.warning("The trainer that stood by has ended.\n%s", self._waiting.process.directory.log_tail())
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
                log.warning("No trainer stands by: %s", error)
                self._is_given_up = True
            else:
                self._waiting = StandbyTrainer(process=process, folder=folder.pop_all())

    def send_heartbeat(self) -> None:
        """Tell it that its worker lives. Never blocks."""
        if (waiting := self._waiting) is not None:
            waiting.process.send_heartbeat()

    def memory_bytes(self) -> int:
        """What it takes of the machine, and will have taken already where it becomes a trainer."""
        return self._waiting.process.memory_bytes() if self._waiting is not None else 0

    def take(self, stack: ExitStack) -> TrainerProcess | None:
        """The one that waits, if it still lives; process and directory end with the stack from here on."""
        self._is_given_up = False
        waiting = self._waiting
        if waiting is None or waiting.process.returncode is not None:
            self.close()
            return None
        self._waiting = None
        waiting.process.send_heartbeat()  # the next one comes with the first beat that guards it
        stack.push(waiting.folder)
        stack.callback(waiting.process.close)
        return waiting.process

    def close(self) -> None:
        """End it, and its directory."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.process.close()
            waiting.folder.close()


def stand_by(directory: TrainerDirectory, warm_up: Callable[[Path], None]) -> None:
    """The trainer's end: load what the trainer of any base model loads, say so, and wait for the settings.

    A GPU isn't touched before there is a job for it.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        try:
            warm_up(directory.path / f"warm-up-{os.environ.get('LOCAL_RANK', '0')}")
        except Exception as error:  # noqa: BLE001  (whatever it is, it comes again with a real base, and is told of it)
            print_handled(error)
    if confined_child.is_first():
        events = EventWriter(directory)
        events.write({"type": "standing_by"})
        events.close()
    while not directory.has_begun():
        time.sleep(LOOK_SECONDS)
