"""Works on batches: claims one after the other, submits their requests, a limited number at a time, and stores the
results.

Every API server runs this loop; they share the batches by leases. The result of each line is stored when it is
complete. After a crash or a lost lease, another process continues with the lines that have no result.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from api.inference.answer import ClientGone, PartialAnswer, deltas_of
from api.inference.batch_input import BatchEntry, InputCheck, custom_id_of, lines_of, parse
from api.inference.batch_output import UNANSWERED, OutputFiles, answer_crashed, failure_result, success_result
from api.inference.calls import prompt_parameter
from api.inference.replies import Replies
from api.inference.responses import whole
from catalog.batches import execution
from catalog.batches.execution import BatchClaim, Directive, Outcome
from catalog.clock import boot_seconds
from catalog.db.database import Database
from catalog.errors import InvalidRequest, LorryError, OutOfSpace, QuotaExceeded, StaleClaim, Unavailable
from catalog.inference import requests
from catalog.queue.notifier import Notifier
from catalog.settings import Settings
from catalog.storage.manifest import DamagedArtifact
from catalog.storage.store import ArtifactStore
from catalog.tables.table import Json, new_id

LOOK_SECONDS = 1.0
"""Interval at which the loop polls for batches."""
KEEP_SECONDS = 5.0
"""Interval at which a lease is renewed, and a cancellation is noticed."""
PAUSE_SECONDS = 30.0
"""Wait of a batch whose project has used up its tokens."""
RETRY_SECONDS = 1.0
TURN_SECONDS = 60.0
"""After this time, a batch lets others continue that wait."""
GRACE_SECONDS = 60.0
"""Time after the turn in which a worker may begin to answer its open requests. Then the others are stopped, and sent
again in the next turn."""
MAX_BATCHES = 4
"""Batches that one process works on at the same time."""
MAX_IN_FLIGHT = 32
"""Requests of one batch that wait for an answer at the same time."""
MAX_ATTEMPTS = 3
"""How often a line is tried whose answer is interrupted by the loss of its worker."""
LINES_AT_ONCE = 50
THREADS = 2
"""Together with the other threads of an API server and the thread that renews leases, fewer than the database's
connections."""
CLOSE_SECONDS = 5.0
log = logging.getLogger("lorry.api")
T = TypeVar("T")


@dataclass(kw_only=True)
class _OpenLine:
    """A line that waits for its answer."""

    number: int
    entry: BatchEntry
    request_id: str = ""
    answer: PartialAnswer = field(default_factory=PartialAnswer)
    """The answer of the current attempt."""


@dataclass(kw_only=True)
class _Run:
    """A batch that this process works on."""

    claimed: BatchClaim
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """No more lines are answered: the batch is cancelled, has expired, is lost or has crashed."""
    is_lost: bool = False
    """Another process may have taken over. Nothing more is written."""
    has_crashed: bool = False
    is_input_intact: bool = False
    """The digest of the input was checked after a line was found invalid."""
    directive: Directive
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_IN_FLIGHT))
    answers: dict[asyncio.Task[None], _OpenLine] = field(default_factory=dict[asyncio.Task[None], _OpenLine])


class BatchRunner:
    def __init__(
        self, db: Database, store: ArtifactStore, settings: Settings, *, replies: Replies, notifier: Notifier
    ) -> None:
        self._db, self._store, self._settings = db, store, settings
        self._replies, self._notifier = replies, notifier
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake_up = asyncio.Event()
        self._threads: anyio.CapacityLimiter | None = None
        self._renewal_thread: anyio.CapacityLimiter | None = None
        """Renewals do not wait for the other threads, which may write large files."""

    def wake(self) -> None:
        """Signal that there is a new batch or a cancellation. May be called from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake_up.set)

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads, self._renewal_thread = anyio.CapacityLimiter(THREADS), anyio.CapacityLimiter(1)
        try:
            while True:
                await self._poll()
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._wake_up.wait()
                self._wake_up.clear()
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)

    async def _poll(self) -> None:
        """Claim batches as long as this process can work on more."""
        try:
            while len(self._tasks) < MAX_BATCHES:
                claimed = await self._in_thread(partial(execution.claim, self._db))
                if claimed is None:
                    return
                task = asyncio.create_task(self._work(claimed))
                self._tasks.add(task)
                task.add_done_callback(self._forget)
        except LorryError as error:
            log.warning("batches code=%s", error.code)
        except Exception:  # the loop must survive any failure of one poll
            log.exception("crash in batches")

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._wake_up.set()

    async def _in_thread(self, act: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(act, limiter=self._threads)

    # One batch

    async def _work(self, claimed: BatchClaim) -> None:
        """Work on a batch until it has ended, its turn is over or its lease is lost. A batch whose processing crashes
        keeps its lease, so that it is tried again only after some time."""
        run: _Run | None = None
        keeper: asyncio.Task[None] | None = None
        is_to_release = True
        try:
            directive = await self._in_thread(partial(execution.renew, self._db, claimed))
            run = _Run(claimed=claimed, directive=directive)
            self._follow(run, directive)
            keeper = asyncio.create_task(self._keep(run))
            await self._advance(run)
            is_to_release = not run.has_crashed
        except StaleClaim:
            is_to_release = False
        except LorryError as error:
            log.warning("batch=%s code=%s: %s", claimed.batch_id, error.code, error)
        except Exception:
            log.exception("crash in the batch %s", claimed.batch_id)
            is_to_release = False
        finally:
            await self._leave(run, keeper)
            if is_to_release:
                with suppress(LorryError):  # its lease expires
                    await self._in_thread(partial(execution.release, self._db, claimed))

    async def _leave(self, run: _Run | None, keeper: asyncio.Task[None] | None) -> None:
        """Stop the tasks of a batch."""
        if run is None:
            return
        run.stopping.set()
        answers = list(run.answers)
        for task in (keeper, *answers):
            if task is not None:
                task.cancel()
        await asyncio.gather(*answers, return_exceptions=True)

    async def _advance(self, run: _Run) -> None:
        """Do what the batch needs next: validate its input, answer its lines, write its files."""
        try:
            if run.directive.status == "validating" and not await self._validate(run):
                return
            if not run.stopping.is_set() and not await self._answer_all(run):
                return  # others continue
            if run.is_lost or run.has_crashed:
                return
            await self._persist(run, partial(execution.finalize, self._db, run.claimed))
            await self._persist(run, partial(self._end, run))
        except DamagedArtifact as error:
            await self._end_without_input(run, error)
        with suppress(LorryError):  # garbage collection deletes the rest
            while await self._in_thread(partial(execution.delete_results, self._db)):
                pass

    async def _end_without_input(self, run: _Run, error: DamagedArtifact) -> None:
        """Fail the batch, because its input can't be read. The results so far are in its files."""
        log.warning("batch=%s code=%s: %s", run.claimed.batch_id, error.code, error)
        run.stopping.set()
        await asyncio.gather(*run.answers, return_exceptions=True)
        if run.is_lost or run.has_crashed:
            return
        await self._persist(run, partial(execution.finalize, self._db, run.claimed))
        await self._persist(run, partial(self._end, run, damage=error))

    async def _keep(self, run: _Run) -> None:
        """Renew the lease periodically, and notice a cancellation, an expiry or the loss of the lease."""
        renewed_at = boot_seconds()
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            try:
                began_at, renew = boot_seconds(), partial(execution.renew, self._db, run.claimed)
                self._follow(run, await anyio.to_thread.run_sync(renew, limiter=self._renewal_thread))
                renewed_at = began_at
            except StaleClaim:
                run.is_lost = True
            except LorryError as error:
                log.warning("batch=%s code=%s", run.claimed.batch_id, error.code)
            except Exception:  # the renewals must survive any failure of one of them
                log.exception("crash in the renewal of the batch %s", run.claimed.batch_id)
            run.is_lost = run.is_lost or boot_seconds() - renewed_at > execution.BATCH_LEASE_SECONDS
            if run.is_lost:
                run.stopping.set()
                return

    def _follow(self, run: _Run, directive: Directive) -> None:
        run.directive = directive
        if directive.is_expired or directive.status == "cancelling":
            run.stopping.set()

    async def _persist(self, run: _Run, act: Callable[[], T]) -> T:
        """Run `act`, again and again while the database or the store is unavailable or full. Raises StaleClaim."""
        while True:
            if run.is_lost:
                raise StaleClaim
            try:
                return await self._in_thread(act)
            except (Unavailable, OutOfSpace) as error:
                log.warning("batch=%s code=%s", run.claimed.batch_id, error.code)
                await asyncio.sleep(RETRY_SECONDS)

    # Its lines

    def _lines(self, run: _Run) -> Callable[[], list[tuple[int, bytes]]]:
        """Return a function that returns the next lines of the input; none at its end. It raises DamagedArtifact."""
        chunks = self._store.open_blob(run.claimed.input_digest)
        lines = lines_of(chunks, max_line_bytes=self._settings.max_line_bytes)
        return lambda: list(islice(lines, LINES_AT_ONCE))

    async def _validate(self, run: _Run) -> bool:
        """Validate all lines. Returns False if the batch has failed."""
        check = InputCheck(
            db=self._db,
            project_id=run.claimed.project_id,
            endpoint=run.claimed.endpoint,
            max_line_bytes=self._settings.max_line_bytes,
        )

        def check_some() -> bool:
            some = following()
            for number, line in some:
                if not check.is_over:
                    check.add(number, line)
            return bool(some) and not check.is_over

        following = await self._in_thread(partial(self._lines, run))
        while not run.stopping.is_set() and await self._in_thread(check_some):
            pass
        if run.stopping.is_set():
            return True
        check.end()
        given = {"num_lines": check.num_lines}
        if check.errors:
            await self._persist(run, partial(execution.fail, self._db, run.claimed, check.errors, **given))
            return False
        await self._persist(run, partial(execution.begin, self._db, run.claimed, **given))
        self._follow(run, await self._persist(run, partial(execution.renew, self._db, run.claimed)))
        return True

    async def _answer_all(self, run: _Run) -> bool:
        """Answer the lines that have no result. Returns False if the turn of the batch is over before the end."""
        loop = asyncio.get_running_loop()
        turn_ends_at = loop.time() + TURN_SECONDS
        stuck_at = turn_ends_at + GRACE_SECONDS
        finished = await self._persist(run, partial(execution.finished_lines, self._db, run.claimed.batch_id))
        if len(finished) == run.directive.num_lines:
            return True
        following = await self._in_thread(partial(self._lines, run))
        is_complete = has_started = is_over = False
        while not (run.stopping.is_set() or is_complete or is_over):
            some = await self._in_thread(following)
            is_complete = not some
            for number, line in some:
                if number in finished or run.stopping.is_set():
                    continue
                if not await self._start(run, number, line, stuck_at=stuck_at):
                    is_over = True
                    break
                has_started = True
            if has_started and not (is_complete or is_over) and loop.time() >= turn_ends_at:
                is_over = await self._is_any_waiting()
        are_answered = await self._finish_open(run, stuck_at=stuck_at)
        return run.stopping.is_set() or (is_complete and are_answered)

    async def _finish_open(self, run: _Run, *, stuck_at: float) -> bool:
        """Wait for the open answers. If other batches wait after `stuck_at`, stop the requests that no worker answers
        yet. Those that a worker answers are never stopped: otherwise a long answer would not end in any turn.

        Returns False if requests were stopped.
        """
        loop, are_answered = asyncio.get_running_loop(), True
        while run.answers and not run.stopping.is_set():
            await asyncio.wait(run.answers, timeout=KEEP_SECONDS)
            if not run.answers or loop.time() < stuck_at or not await self._is_any_waiting():
                continue
            waiting = {task: line for task, line in run.answers.items() if not line.answer.has_begun}
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            for line in waiting.values():
                await self._persist(run, partial(execution.discard, self._db, line.request_id))
            are_answered = are_answered and not waiting
        await asyncio.gather(*run.answers, return_exceptions=True)  # if the batch is to stop, they end at once
        return are_answered

    async def _is_any_waiting(self) -> bool:
        return await self._in_thread(partial(execution.is_any_waiting, self._db))

    async def _start(self, run: _Run, number: int, line: bytes, *, stuck_at: float) -> bool:
        """Submit the request of a line once there is a free slot, and wait for its answer in a task.

        Returns False if the batch is to stop, or if no slot becomes free before `stuck_at` and other batches wait: its
        requests may wait for tokens of a quota or for a base model.
        """
        loop = asyncio.get_running_loop()
        while not (run.stopping.is_set() or await _in_time(run.slots.acquire(), run.stopping, until=stuck_at)):
            if await self._is_any_waiting():
                return False
            stuck_at = loop.time() + KEEP_SECONDS
        if run.stopping.is_set():
            return False
        try:
            limit = self._settings.max_line_bytes
            entry = await self._in_thread(partial(parse, line, endpoint=run.claimed.endpoint, max_line_bytes=limit))
        except InvalidRequest as error:
            await self._reject(run, number, line, error)
            run.slots.release()
            return True
        open_line = _OpenLine(number=number, entry=entry)
        task = asyncio.create_task(self._answer(run, open_line))
        run.answers[task] = open_line
        task.add_done_callback(partial(self._answered, run))
        return True

    async def _reject(self, run: _Run, number: int, line: bytes, error: InvalidRequest) -> None:
        """Store the error of a line that was valid when the batch was accepted: the rules have changed since, or the
        input is damaged. Raises DamagedArtifact, StaleClaim."""
        if not run.is_input_intact:
            await self._persist(run, partial(self._check_input, run))
            run.is_input_intact = True
        request_id = new_id("infer")
        message = f"Line {number} of the input file is not valid any more. {error.message}"
        shown = InvalidRequest(message, code=error.code, remedy=error.remedy, param=error.param)
        result = failure_result(custom_id_of(line), shown, request_id)
        given: Json = {"result": result, "is_failed": True, "prompt_tokens": 0, "completion_tokens": 0}
        store = partial(execution.store_result, self._db, run.claimed, number=number, request_id=request_id, **given)
        await self._persist(run, store)

    def _check_input(self, run: _Run) -> None:
        """Read the whole input. Raises DamagedArtifact and Unavailable."""
        for _ in self._store.open_blob(run.claimed.input_digest):
            pass

    def _answered(self, run: _Run, task: asyncio.Task[None]) -> None:
        del run.answers[task]
        run.slots.release()
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, StaleClaim):
            run.is_lost = True
        elif error is not None:
            log.error("crash in the batch %s", run.claimed.batch_id, exc_info=error)
            run.has_crashed = True
        if error is not None:
            run.stopping.set()

    async def _answer(self, run: _Run, line: _OpenLine) -> None:
        """Answer one line, and store the result. Does neither once the batch is to stop."""
        entry = line.entry
        for attempt in range(1, MAX_ATTEMPTS + 1):
            answer = line.answer = PartialAnswer()
            request_id = line.request_id = new_id("infer")
            try:
                body = await self._body_of(run, request_id, entry, answer)
                parsed = partial(success_result, entry.custom_id, request_id, body)
                result, is_failed = await asyncio.to_thread(parsed), False  # as in `whole`: it may take long
            except ClientGone:
                await self._count_interrupted(run, line)
                return
            except StaleClaim:
                raise
            except Exception as error:  # a line that crashes must not crash its batch again and again
                if isinstance(error, LorryError):
                    told = error
                else:
                    log.exception("crash in the answer %s of the batch %s", request_id, run.claimed.batch_id)
                    told = answer_crashed(request_id)
                if told.code == "answer_interrupted" and attempt < MAX_ATTEMPTS:
                    await self._persist(run, partial(execution.discard, self._db, request_id))
                    continue
                result, is_failed = failure_result(entry.custom_id, told, request_id), True
            store = partial(
                execution.store_result,
                self._db,
                run.claimed,
                number=line.number,
                result=result,
                is_failed=is_failed,
                request_id=request_id,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
            )
            await self._persist(run, store)
            return

    async def _count_interrupted(self, run: _Run, line: _OpenLine) -> None:
        """Count the tokens of an answer that the end of the batch has interrupted. After a crash or with a lost lease,
        the line is answered again, and only that answer is counted."""
        answer = line.answer
        if run.is_lost or run.has_crashed or not answer.prompt_tokens:
            return
        counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        count = partial(execution.count_interrupted, self._db, run.claimed, request_id=line.request_id, **counts)
        await self._persist(run, count)

    async def _body_of(self, run: _Run, request_id: str, entry: BatchEntry, answer: PartialAnswer) -> str:
        """Return the response as JSON. Raises ClientGone if the batch is to stop, StaleClaim and LorryError."""
        find = partial(requests.resolve, self._db, project_id=run.claimed.project_id, name=entry.model)
        model = await self._persist(run, find)
        reply = self._replies.open(request_id)
        try:
            await self._submit(run, request_id, entry, model)
            reply.is_submitted = True
            self._notifier.wake_workers()
            deltas = deltas_of(
                reply,
                answer,
                gone=run.stopping,
                why_unanswered=partial(requests.why_unanswered, self._db, request_id),
                prompt=prompt_parameter(entry.call.parameters),
                wait_seconds=max(run.directive.seconds_left, 0) + execution.BATCH_LEASE_SECONDS,
            )
            async with aclosing(deltas):
                return await whole(deltas, answer, entry.call.form(model), n=entry.call.num_choices)
        finally:
            reply.close()

    async def _submit(self, run: _Run, request_id: str, entry: BatchEntry, model: requests.Model) -> None:
        """Create the request, as soon as the project has tokens left. Raises ClientGone if the batch is to stop."""
        submit = partial(
            execution.submit,
            self._db,
            run.claimed,
            request_id=request_id,
            model=model,
            body=entry.call.parameters,
            reply_to=self._replies.address,
        )
        while not run.stopping.is_set():
            try:
                if await self._persist(run, submit):
                    return
                break
            except QuotaExceeded:
                with suppress(TimeoutError):
                    async with asyncio.timeout(PAUSE_SECONDS):
                        await run.stopping.wait()
        raise ClientGone

    # Its end

    def _end(self, run: _Run, *, damage: DamagedArtifact | None = None) -> None:
        """Write and store the files, and end the batch.

        damage: why the input can't be read. Then the lines without a result are in no file, because their ids are
        unknown. Raises StaleClaim, DamagedArtifact, Unavailable, OutOfSpace.
        """
        directive = execution.renew(self._db, run.claimed)
        num_finished = len(execution.finished_lines(self._db, run.claimed.batch_id))
        is_complete = 0 < num_finished == directive.num_lines
        outcome: Outcome = "completed" if is_complete else "expired"
        if directive.status == "cancelling":
            outcome = "cancelled"
        error: Json | None = None
        if damage is not None and not is_complete:
            outcome, error = "failed", _damaged(damage, num_finished=num_finished, num_lines=directive.num_lines)
        with OutputFiles(self._settings.data_dir / "spool", run.claimed.claim_id) as files:
            if is_complete or error is not None:
                files.write_results(self._db, run.claimed.batch_id)
            elif directive.num_lines:
                inputs = lines_of(
                    self._store.open_blob(run.claimed.input_digest), max_line_bytes=self._settings.max_line_bytes
                )
                files.write(self._db, run.claimed.batch_id, inputs, unanswered=UNANSWERED[outcome])
            output, failures = files.stored(self._store)
        execution.end(self._db, run.claimed, outcome, output=output, failures=failures, error=error)


def _damaged(damage: DamagedArtifact, *, num_finished: int, num_lines: int) -> Json:
    """Return the error of a batch whose input can't be read."""
    message = damage.sentence()
    if num_lines:
        message = f"{message} {num_finished} of the {num_lines} requests were answered before."
    return {"code": damage.code, "message": message, "param": "input_file_id", "line": None}


async def _in_time(acquiring: Coroutine[Any, Any, object], stopping: asyncio.Event, *, until: float) -> bool:
    """Return whether `acquiring` has returned before the time `until` of the event loop, and before `stopping`."""
    tasks = [asyncio.create_task(acquiring), asyncio.create_task(stopping.wait())]
    seconds = until - asyncio.get_running_loop().time()
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=max(0.0, seconds))
        return tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
