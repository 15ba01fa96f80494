"""Start reading here: `supervise` is the main loop of a worker. For one trainer after another, it does four things:

1. Find its work (next_work.py), unless a trainer of another node needs this one (`gang.participate`): claim jobs that
   can train together or, without jobs, claim the load of a base model that inference requests wait for.
2. Launch a trainer for them (`_train`), together with the other nodes of the gang if there are any.
3. Attend to it (`_attend`): record its events, apply what users ask for, admit more jobs, kill it if it hangs.
4. Conclude (`_conclude`): record how the attempts end that it left unfinished.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TypeVar

from catalog import logs
from catalog.clock import boot_seconds
from catalog.errors import LorryError, NotFound, StaleClaim
from catalog.fleet import workers
from catalog.queue import claims
from catalog.queue.claiming import Claim
from catalog.registry import base_models as catalog_bases
from catalog.resources.pack_key import precision_of, quantization_of
from catalog.resources.sharding import Strategy
from catalog.tables.jobs import Job
from worker.background import base_models
from worker.background.child_task import Abandoned, AttemptFailed
from worker.background.task_runner import TaskRunner
from worker.context.context import WorkerContext
from worker.gang.gang import WorkerGang, gang_of
from worker.next_work import Work, announced, find_work, next_work
from worker.node import scratch_dirs
from worker.process.launcher import TrainerProcess, launch
from worker.protocol.mailbox import Json, TrainerDirectory
from worker.session.base_load import BaseLoad, BaseToLoad, strategy_for
from worker.session.failures import TrainerEnd, job_failure, launch_failure
from worker.session.job_logs import cleaned
from worker.session.session_job import STOPPED, End, requested_verb
from worker.session.trainer_session import OUTAGES, TrainerSession
from worker.session.watchdog import cordon_if_unkillable, watch_clock

log = logging.getLogger(__name__)
TICK_SECONDS = 0.05
OUTAGE_SECONDS = 0.5
T = TypeVar("T")


def supervise(context: WorkerContext) -> None:
    """Work until nothing is left to import, prepare or train, or the worker is asked to shut down.

    Raises Unavailable or OutOfSpace if the database does not answer while the worker holds no claim and runs no
    background task. A background task outlives an outage, because its children die with its thread. In every case, no
    lease of a job is renewed after the return.
    """
    try:
        with TaskRunner(context) as tasks:
            while not _worked(context, tasks):
                context.shutdown.wait(OUTAGE_SECONDS)
    finally:
        context.heartbeat.release_all()


def _worked(context: WorkerContext, tasks: TaskRunner) -> bool:
    """Work until nothing is left to do. Returns False in an outage during a background task, which continues."""
    try:
        _work(context, gang_of(context), tasks)
    except OUTAGES as error:
        if not tasks.is_busy:
            raise
        log.warning("%s The background tasks continue.", error)
        context.heartbeat.release_all()
        return False
    return True


def _work(context: WorkerContext, gang: WorkerGang, tasks: TaskRunner) -> None:
    """Run one trainer after another. A trainer that was unloaded for other work hands it on."""
    work: Work | None = None
    was_notified = False
    try:
        while not context.draining:
            had_task = tasks.advance(was_notified=was_notified)
            was_notified = False
            if work is None and gang.participate(tasks, _launch_trainer):
                continue
            work = work or find_work(context, gang)
            if work is not None:
                work = _train(context, gang, tasks, work)
            elif had_task:
                was_notified = _wait_for_work(context, tasks)
            else:
                return
        if work is not None:
            _release(context, work.jobs, TrainerEnd.NOT_LAUNCHED.value)
    finally:
        if work is not None:
            work.give_back()


def _wait_for_work(context: WorkerContext, tasks: TaskRunner) -> bool:
    """Wait until a background task is done, the next poll is due or the worker shuts down, or for a notification.
    Returns whether there was one."""
    due_at = time.monotonic() + context.settings.poll_seconds
    while (left := due_at - time.monotonic()) > 0 and not context.draining:
        if context.notifier.was_notified():
            return True
        if tasks.wait(min(TICK_SECONDS, left)):
            break
    return False


def _train(context: WorkerContext, gang: WorkerGang, tasks: TaskRunner, work: Work) -> Work | None:
    """Run one trainer from launch to exit. Returns the work that it was unloaded for, if any."""
    first, waiting = work.first, list(work.jobs)

    def is_unwanted() -> bool:
        return _are_all_stopped(context, waiting) and isinstance(first, Job)

    with logs.about({"trainer": first.trainer_id}), ExitStack() as stack:
        stack.callback(work.give_back)
        try:
            settings: Json = _trainer_settings(context, first)
            if isinstance(first, Job):
                gang.gather(stack, first, settings)
            base_dir = base_models.ensure(context, first.base_model, first.base_digest, is_unwanted=is_unwanted)
            settings = {**settings, "base_dir": str(base_dir.absolute()), **gang.rendezvous()}
            trainer = _launch_trainer(context, stack, str(first.trainer_id), settings)
            gang.start(trainer, is_unwanted=is_unwanted)
            strategy: Strategy = settings["strategy"]
            session = _open_session(context, stack, first, trainer.directory, work.load, strategy=strategy)
            stack.enter_context(announced(context, trainer, session, first.base_digest))
            for claim in waiting:
                session.admit(claim)
        except (LorryError, OSError, Abandoned) as error:
            if isinstance(error, AttemptFailed):
                _best_effort(partial(_record_load_failure, context, first))
            if work.load is not None and isinstance(error, AttemptFailed | NotFound):
                work.load.fail(error.text)
            elif work.load is not None and not (context.draining or isinstance(error, OUTAGES)):
                work.load.retry()
            _release(context, waiting, TrainerEnd.WORKER_SHUTDOWN.value if context.draining else launch_failure(error))
            return None
        following = _attend(context, gang, tasks, trainer, session, is_for_jobs=isinstance(first, Job))
        _conclude(context, gang, trainer, session)
        if work.load is not None and session.ready is None and not context.draining:
            work.load.retry()
    if following is not None and trainer.is_left_behind:  # it still holds the device
        _release(context, following.jobs, TrainerEnd.UNKILLABLE.value)
        following.give_back()
        return None
    return following


def _are_all_stopped(context: WorkerContext, waiting: list[Claim]) -> bool:
    """Before a trainer runs: remove from `waiting` the jobs that are to stop. Returns whether none is left."""
    for claim_id, directive in context.heartbeat.take_directives([claim.claim_id for claim in waiting]).items():
        for claim in [claim for claim in waiting if claim.claim_id == claim_id]:
            verb = requested_verb(directive)
            if verb is not None:
                _release(context, [claim], STOPPED[verb])
            if verb is not None or directive.stale:
                context.spans.ended(claim.claim_id, None)
                waiting.remove(claim)
    return not waiting


def _record_load_failure(context: WorkerContext, first: Job | BaseToLoad) -> None:
    """Record a trainer that never became ready. Such records show that a base can't be loaded on this worker."""
    trainer_id, key, digest = str(first.trainer_id), first.pack_key, first.base_digest
    workers.register_trainer(
        context.db, trainer_id=trainer_id, worker_id=context.worker_id, base_digest=digest, pack_key=key
    )
    workers.end_trainer(context.db, trainer_id)


def _trainer_settings(context: WorkerContext, first: Job | BaseToLoad) -> Json:
    """Return the settings of a trainer for jobs like `first`, except the folder of its base model, which differs
    between nodes."""
    return {
        "trainer_id": first.trainer_id,
        "dtype": precision_of(first.pack_key),
        "quantization": quantization_of(first.pack_key),
        "strategy": strategy_for(context, first),
        "device": context.device.torch_name(),
        "batch_invariant": context.settings.batch_invariant,
        "idle_seconds": None,  # the worker decides when it unloads, so it never exits while a job is being admitted
    }


def _launch_trainer(context: WorkerContext, stack: ExitStack, trainer_id: str, settings: Json) -> TrainerProcess:
    """Have the standby trainer, or else a new one, load its base. The stack kills it and deletes its directory."""
    if context.standby is not None and (trainer := context.standby.take(stack)) is not None:
        trainer.begin(settings)
        if trainer.returncode is None:  # else it exited at this very moment, which must not count against any job
            return trainer
    path = stack.enter_context(scratch_dirs.owned(context.trainers_dir() / trainer_id))
    trainer = launch(
        TrainerDirectory.create(path),
        context.device,
        silence_seconds=context.settings.lease_seconds,
        bases_dir=context.settings.bases_dir(),
        num_processes=context.num_processes,
        in_gang=context.settings.gang is not None,
    )
    stack.callback(trainer.close)
    trainer.begin(settings)
    return trainer


def _open_session(
    context: WorkerContext,
    stack: ExitStack,
    first: Job | BaseToLoad,
    directory: TrainerDirectory,
    load: BaseLoad | None,
    *,
    strategy: Strategy,
) -> TrainerSession:
    """Return an empty session for jobs like `first`. The stack releases the claims that are left in it, and
    interrupts its answers."""
    assert first.trainer_id is not None, "the claim names the trainer that it is for"
    description = catalog_bases.get(context.db, first.base_model).description or {}
    session = TrainerSession(
        context,
        first.trainer_id,
        directory,
        first.pack_key,
        description=description,
        strategy=strategy,
        load=load,
    )
    stack.callback(session.release_all)
    return session


def _attend(
    context: WorkerContext,
    gang: WorkerGang,
    tasks: TaskRunner,
    trainer: TrainerProcess,
    session: TrainerSession,
    *,
    is_for_jobs: bool,
) -> Work | None:
    """Attend to the trainer until it has exited, or can't be killed. Returns what it was unloaded for, as `_train`.

    Each step tolerates an outage separately: requests of users are applied even while nothing can be recorded.
    """
    take_directives = context.heartbeat.take_directives
    following: Work | None = None
    polled_at = time.monotonic()
    closing_at: float | None = None
    """When the trainer was first to shut down or unload. From then on it gets no new job."""
    shutdown: Callable[[], bool] | None = None
    """Sends the message for it. Repeated until it succeeds, because a full disk may have space again in time."""
    while trainer.is_awaited:
        if trainer.is_killed:
            time.sleep(TICK_SECONDS)
            continue
        _tolerating_outages(trainer, session.read_events)
        _tolerating_outages(trainer, lambda: session.apply_directives(take_directives(session.claim_ids)))
        if session.fault is not None:
            session.outcome = session.fault
        is_unwanted = session.ready is None and session.is_empty and (is_for_jobs or closing_at is not None)
        if session.fault is not None or is_unwanted:
            trainer.kill()  # in the second case, all its jobs were stopped before it was ready
            continue
        is_to_shut_down = _tolerating_outages(trainer, lambda: gang.monitor(trainer)) or context.draining
        if trainer.is_killed:
            continue  # by `monitor`: nothing more may be claimed for it
        if is_to_shut_down and closing_at is None:
            closing_at, shutdown = time.monotonic(), partial(_drain, gang, trainer, session)
        was_notified = context.notifier.was_notified()
        tasks.advance(was_notified=was_notified)
        if closing_at is None:
            _tolerating_outages(trainer, session.hand_over)
        if not is_to_shut_down:
            _tolerating_outages(trainer, session.serve_requests)
        is_due = was_notified or time.monotonic() - polled_at >= context.settings.poll_seconds
        if closing_at is None and is_due:
            polled_at = time.monotonic()
            following = _tolerating_outages(trainer, lambda: next_work(context, gang, session))
            if following is not None or _is_idle(context, gang, session):
                closing_at, shutdown = time.monotonic(), partial(session.unload)
        if shutdown is not None and _tolerating_outages(trainer, shutdown):
            shutdown = None
        watch_clock(context, trainer, session, closing_at)
        trainer.wait(TICK_SECONDS)
    return following


def _tolerating_outages(trainer: TrainerProcess, act: Callable[[], T]) -> T | None:
    """Return the result of `act`. In an outage, or if a file is not available now, return None after a pause."""
    try:
        return act()
    except (*OUTAGES, OSError) as error:
        log.warning("%s The trainer continues, and its events are kept.", error)
        trainer.wait(OUTAGE_SECONDS)
        return None


def _drain(gang: WorkerGang, trainer: TrainerProcess, session: TrainerSession) -> bool:
    """Have the trainer save its jobs and exit. Returns True: the request was made. A trainer that still loads has
    nothing to save, so it is killed."""
    if session.ready is not None:
        session.is_shutting_down = True
        session.send("drain")
        session.inference.stop_accepting()
        return True
    session.outcome = gang.shutdown_end.value
    trainer.kill()
    return True


def _is_idle(context: WorkerContext, gang: WorkerGang, session: TrainerSession) -> bool:
    """Whether the trainer is empty, and has been for too long or can get no new job."""
    idle_since = max(session.idle_since, session.inference.last_answer_at)
    is_overdue = time.monotonic() - idle_since >= context.settings.idle_seconds
    is_empty = session.is_empty and session.ready is not None
    return is_empty and (is_overdue or not gang.is_open)


def _conclude(context: WorkerContext, gang: WorkerGang, trainer: TrainerProcess, session: TrainerSession) -> None:
    """After the trainer has exited, or could not be killed: record its last events, and end the attempts of the jobs
    that it left unfinished. An outage is waited for as long as the claims may still be valid."""
    deadline = boot_seconds() + context.settings.lease_seconds
    end = TrainerEnd.DATABASE_UNREACHABLE.value
    while not context.heartbeat.lost.is_set() and boot_seconds() < deadline:
        try:
            session.read_all_events()
            cordon_if_unkillable(context, trainer)
            if session.is_shutting_down:  # a job that the trainer never got lost nothing, however the trainer exited
                session.end_all(gang.shutdown_end.value, only_unseen=True)
            session.end_all(_trainer_outcome(context, gang, trainer, session))
            return
        except (*OUTAGES, OSError) as error:
            log.warning("%s Waiting to record how the trainer ended.", error)
            end = TrainerEnd.DATABASE_UNREACHABLE.value
            if isinstance(error, OSError):
                end = replace(job_failure(error), blamed_worker_id=context.worker_id)
            time.sleep(OUTAGE_SECONDS)
    _best_effort(lambda: cordon_if_unkillable(context, trainer))
    _best_effort(lambda: session.end_all(end))


def _trainer_outcome(context: WorkerContext, gang: WorkerGang, trainer: TrainerProcess, session: TrainerSession) -> End:
    """Return how the attempts of the trainer's jobs end. The first cause that applies decides."""
    if trainer.is_left_behind:
        return replace(TrainerEnd.UNKILLABLE.value, blamed_worker_id=context.worker_id)
    if session.outcome is not None:
        return session.outcome
    if context.draining:
        return TrainerEnd.WORKER_SHUTDOWN.value
    if not len(session):
        return TrainerEnd.EMPTY.value
    return gang.exit_end(trainer, is_ready=session.ready is not None)


def _release(context: WorkerContext, claimed: Sequence[Claim], end: End) -> None:
    """End the attempts of jobs that no trainer has begun."""
    for claim in claimed:
        context.heartbeat.release(claim.claim_id)
        recorded = cleaned(end, claim, context.settings.data_dir)
        how = {"reason": recorded.reason, "detail": recorded.detail, "is_bystander": True, "policy": context.policy}
        _best_effort(partial(claims.end, context.db, claim.claim_id, **how))
        context.spans.ended(claim.claim_id, end.reason)


def _best_effort(record: Callable[[], object]) -> None:
    """Record something as a trainer ends. If that fails, the lease expires, and recovery ends the attempt as
    INFRA_LOST."""
    try:
        record()
    except (LorryError, StaleClaim, OSError) as error:
        log.warning("Not recorded: %s", error)
