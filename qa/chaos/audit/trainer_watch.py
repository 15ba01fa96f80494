"""Observes several times a second which trainers run and which jobs' files they hold. No table contains this."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil

from qa.chaos.audit.findings import Sighting
from qa.chaos.audit.leftovers import processes

LOOK_SECONDS = 0.25
ENTRY = "worker.children.trainer.main"


class Watch:
    """Observes one work folder during the block."""

    def __init__(self, work_dir: Path) -> None:
        self._work_dir = work_dir
        self._seen: dict[tuple[int, str], Sighting] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def sightings(self) -> list[Sighting]:
        return list(self._seen.values())

    def _look_on(self) -> None:
        while not self._is_over.wait(LOOK_SECONDS):
            for process in processes(self._work_dir):
                self._note(process)

    def _note(self, process: psutil.Process) -> None:
        try:
            argv = process.cmdline()
        except psutil.Error:
            return
        if ENTRY not in argv:
            return
        now = time.time()
        for folder in (Path(argv[argv.index(ENTRY) + 1]) / "jobs").glob("*"):
            key = process.pid, folder.name
            first_at = self._seen[key].first_at if key in self._seen else now
            self._seen[key] = Sighting(pid=process.pid, claim_id=folder.name, first_at=first_at, last_at=now)
