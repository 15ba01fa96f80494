"""Celery wakes workers: a message means "poll the queue" and nothing else.

A lost message costs seconds, and a duplicate costs nothing: claims in the database decide which job trains. API servers
send messages after submissions, and periodically while work waits. An idle worker also polls the database. Run it with
`python -m worker.entrypoints.celery_worker`.
"""
# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from types import FrameType
from typing import Any

from celery import Celery
from celery.signals import (
    after_setup_logger,
    after_setup_task_logger,
    worker_init,
    worker_process_init,
    worker_process_shutdown,
    worker_shutting_down,
)

from catalog import logs, tracing
from catalog.db.database import Database
from catalog.errors import OutOfSpace, Unavailable, UnfitWorker
from catalog.fleet import compatibility
from catalog.processes import deny_inspection
from catalog.queue.notifier import QUEUE, TRANSPORT_OPTIONS
from catalog.settings import unknown_variables
from lorry.local.parent_watch import die_with_parent
from worker.context.context import UNFIT, WorkerContext, open_worker, settings_or_exit
from worker.node import devices
from worker.supervisor import supervise

log = logging.getLogger("worker")
POLL_SECONDS = 15.0
"""Between two polls of the database by an idle worker."""
BROKER_OF_NOBODY = "memory://"
"""The broker if none is set: the module can be imported, and a worker only polls."""


class QueuePoller:
    """Runs the turns of one pool process. Those without a message run on a separate thread."""

    def __init__(self, work: Callable[[], None], *, seconds: float) -> None:
        """work: works until nothing is left to do. seconds: the interval between two polls."""
        self.seconds = seconds
        self._work = work
        self._busy = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll_loop, name="queue-poller", daemon=True)

    def begin(self) -> None:
        """Start polling. Call it once per process, after the fork."""
        self._thread.start()

    def end(self) -> None:
        """Stop polling. Waits for the current turn, whose worker has been asked to shut down."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def work(self) -> None:
        """Take a turn for a message. It waits for a turn of the polling thread to end. Meanwhile, further messages go
        to idle workers, as during any turn for a message."""
        with self._busy:
            self._work()

    def _poll_loop(self) -> None:
        """Poll at intervals. Skips a poll during another turn, because that turn leaves nothing to do."""
        while not self._ended.wait(self.seconds):
            if self._busy.acquire(blocking=False):
                try:
                    self._poll()
                finally:
                    self._busy.release()

    def _poll(self) -> None:
        try:
            self._work()
        except (Unavailable, OutOfSpace) as error:
            log.warning("%s", error)
        except Exception:  # Celery also logs any error and waits for the next message
            log.exception("A poll of the queue failed.")


app = Celery("lorry", broker=settings_or_exit().resolved_redis_url() or BROKER_OF_NOBODY)
app.conf.update(
    # Acknowledged on receipt: with late acknowledgement, a Redis restart ended the worker, and a task longer
    # than the visibility timeout ran again. The next poll compensates for a lost message.
    task_acks_late=False,
    task_reject_on_worker_lost=False,  # else a job that kills its worker would be redelivered forever
    worker_disable_prefetch=True,  # a busy worker must not hold a message that an idle worker could handle
    worker_prefetch_multiplier=1,
    worker_concurrency=1,  # one device, one trainer
    task_ignore_result=True,
    result_backend=None,  # results are in the database
    accept_content=["json"],  # never pickle: a client of Redis could run code here
    task_serializer="json",  # the format in accept_content
    task_default_queue=QUEUE,
    broker_connection_max_retries=None,  # wait for Redis for as long as it takes
    broker_connection_retry_on_startup=True,  # worker and Redis may start in any order
    broker_transport_options=dict(TRANSPORT_OPTIONS),
    worker_enable_remote_control=False,  # else any client of Redis could stop workers; nothing here uses it
    worker_hijack_root_logger=False,
)

_shutdown = multiprocessing.get_context("fork").Event()
"""Set in the main process, and visible in the process that trains, which is forked from it."""
_open = ExitStack()
_opening = threading.Lock()
_ending = threading.Lock()
"""Acquired forever by the first thread that terminates the main process."""
_context: WorkerContext | None = None


def context() -> WorkerContext:
    """Return the worker of this pool process, and open it on the first call."""
    global _context  # noqa: PLW0603  (one per process, opened on the first call)
    with _opening:
        if _context is None:
            with ExitStack() as opening:  # undone if a step fails, because the next call retries
                tracing.start("worker")
                opening.callback(tracing.stop)
                device = devices.choose_device(os.environ.get("LORRY_DEVICE", "auto"))
                devices.pin_to(device)
                opened = opening.enter_context(open_worker(settings_or_exit(), device=device))
                opened.is_shutdown_requested = _shutdown.is_set
                opened.heartbeat.on_drain = _terminate_main
                _open.enter_context(opening.pop_all())
            _context = opened
        return _context


def _work() -> None:
    """Work until nothing is left to do."""
    try:
        supervise(context())
    except UnfitWorker as error:
        log.error("%s", error.sentence())
        _terminate_main()
    else:
        context().stand_by()


poller = QueuePoller(_work, seconds=POLL_SECONDS)
"""The poller of this pool process."""


@after_setup_logger.connect
@after_setup_task_logger.connect
def _redact(*, logger: logging.Logger, **_: Any) -> None:
    logs.set_up_handlers(logger)


@worker_init.connect
def _refuse_unfit(**_: Any) -> None:
    """Exit before any message is taken if this worker is incompatible with the service.

    If the database does not answer yet, the pool process checks again. Pool processes are forked later, so they are
    protected from inspection like this one.
    """
    deny_inspection()
    for warning in unknown_variables(os.environ):
        log.warning("%s", warning)
    if settings_or_exit().gang is not None:
        log.error("A worker of a gang must poll, because no message announces a round. Start it with `lorry worker`.")
        sys.exit(UNFIT)
    with closing(Database(settings_or_exit().resolved_database_url())) as db, suppress(Unavailable):
        try:
            compatibility.check(db)
        except UnfitWorker as error:
            log.error("%s", error.sentence())
            sys.exit(UNFIT)


@worker_process_init.connect
def _begin(**_: Any) -> None:
    die_with_parent()
    try:
        context().stand_by()
    except UnfitWorker as error:
        log.error("%s", error.sentence())
        _terminate_main()
    except (Unavailable, OutOfSpace) as error:
        log.warning("%s The worker keeps retrying.", error)
    poller.begin()


def _terminate_main() -> None:
    """Terminate the main process, which waits until this process has saved its jobs and exited. The signal is sent only
    once, because the main process does not wait after a second one."""
    if _ending.acquire(blocking=False):
        os.kill(os.getppid(), signal.SIGTERM)


@worker_shutting_down.connect
def _request_shutdown(**_: Any) -> None:
    """Ask the pool process to shut down. Runs in the main process at the first signal.

    Celery would keep waiting at a second signal. This handler exits at once instead, and the kernel then kills the pool
    and the trainer. The catalog survives that in the same way as a power failure.
    """
    _shutdown.set()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_immediately)


def _exit_immediately(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)


@worker_process_shutdown.connect
def _end(**_: Any) -> None:
    if _context is not None:
        _context.shutdown.set()
    poller.end()
    _open.close()


@app.task(name="lorry.work")
def work(*_ignored: Any, **_also_ignored: Any) -> None:
    """Work until nothing is left to do."""
    poller.work()
