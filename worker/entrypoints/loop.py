"""The embedded worker: `python -m worker.entrypoints.loop`. It works while there is work. Then it polls the queue after
each notification and at regular intervals.

At SIGTERM or SIGINT, it saves and releases every job, then exits. At a second signal, it exits at once. The catalog
survives that in the same way as a power failure.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType

from catalog import logs, tracing
from catalog.errors import OutOfSpace, Unavailable, UnfitWorker
from catalog.processes import deny_inspection
from catalog.settings import unknown_variables
from worker.context.context import UNFIT, WorkerContext, open_worker, settings_or_exit
from worker.node import devices
from worker.supervisor import supervise

log = logging.getLogger("worker")
DEVICE_HELP = "cpu, CPU cores such as cpu:0-3, GPU numbers such as 2 or 0,1, or auto: the first GPU, else the CPU"
RETRY_SECONDS = 1.0
NOTIFICATION_SECONDS = 0.05
"""Interval at which an idle worker checks for notifications."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    logs.configure("info")
    deny_inspection()
    for warning in unknown_variables(os.environ):
        log.warning("%s", warning)
    device = devices.choose_device(options.device)
    devices.pin_to(device)
    tracing.start("worker")
    with ExitStack() as stack:
        stack.callback(tracing.stop)
        try:
            context = _opened(stack, device)
        except UnfitWorker as error:
            log.error("%s", error.sentence())
            return UNFIT
        shut_down_on_signal(context.shutdown)
        log.info("Worker %s on %s.", context.worker_id, device.name)
        run(context, once=options.once)
    return 0


def _opened(stack: ExitStack, device: devices.Device) -> WorkerContext:
    """Open the worker. Waits for the database, because worker and database may start in any order. Logs this once."""
    reported = ""
    while True:
        try:
            return stack.enter_context(open_worker(settings_or_exit(), device=device))
        except Unavailable as error:
            if error.message != reported:
                reported = error.message
                log.warning("%s The worker keeps retrying.", reported)
            time.sleep(RETRY_SECONDS)


def run(context: WorkerContext, *, once: bool = False) -> None:
    """Work and poll until the worker is asked to shut down. once: until there is nothing to do."""
    while not context.draining:
        try:
            supervise(context)
        except (Unavailable, OutOfSpace) as error:
            log.warning("%s", error)
        else:
            if once:
                return
            context.stand_by()
        _wait(context)


def _wait(context: WorkerContext) -> None:
    """Wait for a notification, for the next poll, or until the worker is asked to shut down."""
    due_at = time.monotonic() + context.settings.poll_seconds
    while not context.notifier.was_notified() and (left := due_at - time.monotonic()) > 0:
        if context.shutdown.wait(min(NOTIFICATION_SECONDS, left)):
            return


def shut_down_on_signal(shutdown: threading.Event) -> None:
    """Ask the worker to shut down at the first signal. At the second one, exit at once; the kernel then kills the
    trainer."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if shutdown.is_set():
            os._exit(128 + number)
        shutdown.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.entrypoints.loop", description=__doc__)
    wanted = os.environ.get("LORRY_DEVICE", "auto")
    parser.add_argument("--device", default=wanted, help=DEVICE_HELP)
    parser.add_argument("--once", action="store_true", help="exit when there is nothing left to do")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
