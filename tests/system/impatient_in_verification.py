"""The embedded worker with a short silence limit: `python -m tests.system.impatient_in_verification`.

It kills a trainer that sends no events for 5 s during a verification, or for an hour otherwise.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from catalog.settings import Settings
from worker.context.context import WorkerContext, open_worker
from worker.entrypoints import loop
from worker.node import devices

VERIFYING_SECONDS = 5.0
OTHERWISE_SECONDS = 3600.0


@contextmanager
def impatient(settings: Settings, *, device: devices.Device) -> Generator[WorkerContext]:
    with open_worker(settings, device=device) as context:
        context.verifying_seconds, context.progress_seconds = VERIFYING_SECONDS, OTHERWISE_SECONDS
        yield context


if __name__ == "__main__":
    loop.open_worker = impatient
    loop.main(["--device", "cpu"])
