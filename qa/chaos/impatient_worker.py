"""`python -m qa.chaos.impatient_worker`: an embedded worker that kills a trainer without events after 5 seconds."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from catalog.settings import Settings
from worker.context.context import WorkerContext, open_worker
from worker.entrypoints import loop
from worker.node import devices

PROGRESS_SECONDS = 5.0


@contextmanager
def impatient(settings: Settings, *, device: devices.Device) -> Generator[WorkerContext]:
    with open_worker(settings, device=device) as context:
        context.progress_seconds = PROGRESS_SECONDS
        yield context


if __name__ == "__main__":
    loop.open_worker = impatient
    loop.main(["--device", "cpu"])
