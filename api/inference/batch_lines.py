"""Answers the lines of a batch, a limited number at a time, and stores the results."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from api.inference.answer import ClientGone, PartialAnswer
from api.inference.batch_input import BatchEntry, custom_id_of, lines_of, parse
from api.inference.batch_lease import LeasedBatch
from api.inference.batch_output import answer_crashed, failure_result, success_result
from api.inference.exchange import EngineRequest, Engines
from api.inference.responses import whole
from catalog.batches import execution
from catalog.errors import InvalidRequest, LorryError, QuotaExceeded, StaleClaim
from catalog.inference import requests
from catalog.inference.engines import INTERRUPTED
from catalog.storage.store import ArtifactStore
from catalog.tables.table import Json, new_id

PAUSE_SECONDS = 30.0
"""Wait of a batch whose project has used up its tokens."""
TURN_SECONDS = 60.0
"""After this time, a batch lets others continue that wait."""
GRACE_SECONDS = 60.0
"""Time after the turn in which a worker may begin to answer its open requests. Then the others are stopped, and sent
again in the next turn."""
CHECK_SECONDS = 5.0
"""Interval at which a batch that can't continue checks whether others wait."""
MAX_IN_FLIGHT = 32
"""Requests of one batch that wait for an answer at the same time."""
MAX_ATTEMPTS = 3
"""How often a line is tried whose answer is interrupted by the loss of its worker."""
LINES_AT_ONCE = 50
log = logging.getLogger("lorry.api")


@dataclass(kw_only=True)
class _OpenLine:
    """A line that waits for its answer."""

    number: int
    entry: BatchEntry
    request_id: str = ""
    model: requests.Model | None = None
    answer: PartialAnswer = field(default_factory=PartialAnswer)
    """The answer of the current attempt."""


class BatchLines:
    """The lines of one batch. `max_line_bytes` limits each of them."""

    def __init__(
        self,
        batch: LeasedBatch,
        store: ArtifactStore,
        engines: Engines,
        *,
        max_line_bytes: int,
    ) -> None:
        self._batch, self._db, self._store = batch, batch.db, store
        self._max_line_bytes = max_line_bytes
        self._engines = engines
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._answers: dict[asyncio.Task[None], _OpenLine] = {}
        self._is_input_intact = False
        """The digest of the input was checked after a line was found invalid."""

    def read(self) -> Callable[[], list[tuple[int, bytes]]]:
        """Return a function that returns the next lines of the input; none at its end. It raises DamagedArtifact."""
        chunks = self._store.open_blob(self._batch.claimed.input_digest)
        lines = lines_of(chunks, max_line_bytes=self._max_line_bytes)
        return lambda: list(islice(lines, LINES_AT_ONCE))

    async def answer_all(self) -> bool:
        """Answer the lines that have no result. Returns False if the turn of the batch is over before the end."""
        loop = asyncio.get_running_loop()
        turn_ends_at = loop.time() + TURN_SECONDS
        stuck_at = turn_ends_at + GRACE_SECONDS
        finished = await self._batch.persist(partial(execution.finished_lines, self._db, self._batch.claimed.batch_id))
        if len(finished) == self._batch.directive.num_lines:
            return True
        following = await self._batch.threads.run(self.read)
        is_complete = has_started = is_over = False
        while not (self._batch.stopping.is_set() or is_complete or is_over):
            some = await self._batch.threads.run(following)
            is_complete = not some
            for number, line in some:
                if number in finished or self._batch.stopping.is_set():
                    continue
                if not await self._start(number, line, stuck_at=stuck_at):
                    is_over = True
                    break
                has_started = True
            if has_started and not (is_complete or is_over) and loop.time() >= turn_ends_at:
                is_over = await self._is_any_waiting()
        are_answered = await self._finish_open(stuck_at=stuck_at)
        return self._batch.stopping.is_set() or (is_complete and are_answered)

    async def settle(self) -> None:
        """Wait for the open answers, which end at once if the batch is to stop."""
        await asyncio.gather(*self._answers, return_exceptions=True)

    async def stop(self) -> None:
        """Stop the tasks of the open answers."""
        for task in self._answers:
            task.cancel()
        await self.settle()

    async def _finish_open(self, *, stuck_at: float) -> bool:
        """Wait for the open answers. If other batches wait after `stuck_at`, stop the requests that no worker answers
        yet. Those that a worker answers are never stopped: otherwise a long answer would not end in any turn.

        Returns False if requests were stopped.
        """
        loop, are_answered = asyncio.get_running_loop(), True
        while self._answers and not self._batch.stopping.is_set():
            await asyncio.wait(self._answers, timeout=CHECK_SECONDS)
            if not self._answers or loop.time() < stuck_at or not await self._is_any_waiting():
                continue
            waiting = {task: line for task, line in self._answers.items() if not line.answer.has_begun}
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            are_answered = are_answered and not waiting
        await asyncio.gather(*self._answers, return_exceptions=True)  # if the batch is to stop, they end at once
        return are_answered

    async def _is_any_waiting(self) -> bool:
        return await self._batch.threads.run(partial(execution.is_any_waiting, self._db))

    async def _start(self, number: int, line: bytes, *, stuck_at: float) -> bool:
        """Submit the request of a line once there is a free slot, and wait for its answer in a task.

        Returns False if the batch is to stop, or if no slot becomes free before `stuck_at` and other batches wait: its
        requests may wait for tokens of a quota or for a base model.
        """
        loop = asyncio.get_running_loop()
        while not (
            self._batch.stopping.is_set() or await _in_time(self._slots.acquire(), self._batch.stopping, until=stuck_at)
        ):
            if await self._is_any_waiting():
                return False
            stuck_at = loop.time() + CHECK_SECONDS
        if self._batch.stopping.is_set():
            return False
        try:
            limit = self._max_line_bytes
            entry = await self._batch.threads.run(
                partial(parse, line, endpoint=self._batch.claimed.endpoint, max_line_bytes=limit)
            )
        except InvalidRequest as error:
            await self._reject(number, line, error)
            self._slots.release()
            return True
        open_line = _OpenLine(number=number, entry=entry)
        task = asyncio.create_task(self._answer(open_line))
        self._answers[task] = open_line
        task.add_done_callback(self._answered)
        return True

    async def _reject(self, number: int, line: bytes, error: InvalidRequest) -> None:
        """Store the error of a line that was valid when the batch was accepted: the rules have changed since, or the
        input is damaged. Raises DamagedArtifact, StaleClaim."""
        if not self._is_input_intact:
            await self._batch.persist(self._check_input)
            self._is_input_intact = True
        request_id = new_id("infer")
        message = f"Line {number} of the input file is not valid any more. {error.message}"
        shown = InvalidRequest(replace(error.text, message=message))
        result = failure_result(custom_id_of(line), shown, request_id)
        given: Json = {
            "base_model": None,
            "result": result,
            "is_failed": True,
            "prompt_tokens": 0,
            "completion_tokens": 0,
        }
        store = partial(
            execution.store_result, self._db, self._batch.claimed, number=number, request_id=request_id, **given
        )
        await self._batch.persist(store)

    def _check_input(self) -> None:
        """Read the whole input. Raises DamagedArtifact and Unavailable."""
        for _ in self._store.open_blob(self._batch.claimed.input_digest):
            pass

    def _answered(self, task: asyncio.Task[None]) -> None:
        del self._answers[task]
        self._slots.release()
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, StaleClaim):
            self._batch.is_lost = True
        elif error is not None:
            log.error("crash in the batch %s", self._batch.claimed.batch_id, exc_info=error)
            self._batch.has_crashed = True
        if error is not None:
            self._batch.stopping.set()

    async def _answer(self, line: _OpenLine) -> None:
        """Answer one line, and store the result. Does neither once the batch is to stop."""
        entry = line.entry
        for attempt in range(1, MAX_ATTEMPTS + 1):
            answer = line.answer = PartialAnswer()
            request_id = line.request_id = new_id("infer")
            try:
                body = await self._body_of(line)
                parsed = partial(success_result, entry.custom_id, request_id, body)
                result, is_failed = await asyncio.to_thread(parsed), False  # as in `whole`: it may take long
            except ClientGone:
                await self._count_interrupted(line)
                return
            except StaleClaim:
                raise
            except Exception as error:  # a line that crashes must not crash its batch again and again
                if isinstance(error, LorryError):
                    told = error
                else:
                    log.exception("crash in the answer %s of the batch %s", request_id, self._batch.claimed.batch_id)
                    told = answer_crashed(request_id)
                if told.code == INTERRUPTED and attempt < MAX_ATTEMPTS:
                    continue
                result, is_failed = failure_result(entry.custom_id, told, request_id), True
            store = partial(
                execution.store_result,
                self._db,
                self._batch.claimed,
                number=line.number,
                base_model=None if line.model is None else line.model.base_model,
                result=result,
                is_failed=is_failed,
                request_id=request_id,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
            )
            await self._batch.persist(store)
            return

    async def _count_interrupted(self, line: _OpenLine) -> None:
        """Count the tokens of an answer that the end of the batch has interrupted. After a crash or with a lost lease,
        the line is answered again, and only that answer is counted."""
        answer = line.answer
        if self._batch.is_lost or self._batch.has_crashed or line.model is None or not answer.prompt_tokens:
            return
        counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        count = partial(
            execution.count_interrupted,
            self._db,
            self._batch.claimed,
            base_model=line.model.base_model,
            request_id=line.request_id,
            **counts,
        )
        await self._batch.persist(count)

    async def _body_of(self, line: _OpenLine) -> str:
        """Return the response as JSON, once the project has tokens left. Raises ClientGone if the batch is to stop,
        StaleClaim and LorryError."""
        entry, project_id = line.entry, self._batch.claimed.project_id
        find = partial(requests.resolve, self._db, project_id=project_id, name=entry.model)
        line.model = model = await self._batch.persist(find)
        request = EngineRequest(
            project_id=project_id,
            model=model,
            parameters=entry.call.parameters,
            gone=self._batch.stopping,
            is_batch=True,
            wait_seconds=max(self._batch.directive.seconds_left, 0) + execution.BATCH_LEASE_SECONDS,
        )
        while not self._batch.stopping.is_set():
            try:
                await self._batch.persist(partial(requests.check_quota, self._db, project_id=project_id))
            except QuotaExceeded:
                with suppress(TimeoutError):
                    async with asyncio.timeout(PAUSE_SECONDS):
                        await self._batch.stopping.wait()
                continue
            async with self._engines.answering(request, line.answer) as deltas:
                return await whole(deltas, line.answer, entry.call.form(model), n=entry.call.num_choices)
        raise ClientGone


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
