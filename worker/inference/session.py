"""The inference requests of one trainer: their order, the adapters that they need, and the events that answer them.

InferenceServer passes requests in, and sends the events out. Everything here runs in its event loop, except for what is
marked as being for the worker's main thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import shutil
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from catalog.error_texts import ErrorText
from catalog.errors import LorryError, OutOfSpace, Unavailable
from catalog.inference.engines import NOT_BEGUN
from catalog.storage.manifest import DamagedArtifact
from catalog.storage.store import ArtifactStore
from catalog.tables.table import Json, new_id
from worker.protocol.answer_pipes import WorkerPipes
from worker.protocol.errors import described
from worker.protocol.mailbox import MalformedEvent, StagedAdapter, TrainerDirectory

MAX_OPEN = 256
"""Number of unfinished answers from which on a trainer gets no more requests."""
MAX_BATCH_OPEN = MAX_OPEN // 2
"""The same for answers of batches."""
MAX_WAITING = 32
"""Number of answers without a first token from which on a trainer gets no more requests; separately for batches. The
others wait in this process, where the tenants take turns."""
WAITING_SECONDS = 15.0
"""Interval at which a waiting request is reported as such."""
MAX_QUEUED_BYTES = 2**26
"""Size of the text of one answer that its API server has not read yet. Beyond it, the answer is abandoned."""
STAGED_ADAPTERS = 128
"""Maximum number of adapters in a trainer's directory."""
_NOT_BEGUN: Json = {**ErrorText.of(NOT_BEGUN).report()}
_INTERRUPTED: Json = {**ErrorText.of("trainer_lost_in_answer").report()}
log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class OpenAnswer:
    """A request, and the events that answer it."""

    body: Json
    """That of `answer` in mailbox.py, except request_id and adapter."""
    adapter: str | None
    """Digest of the adapter's manifest. None: the base model answers."""
    tenant: str
    is_batch: bool
    request_id: str = field(default_factory=lambda: new_id("infer"))
    is_sent: bool = False
    """The trainer has the request."""
    begun: set[int] = field(default_factory=set[int])
    """Indices of the choices that have begun."""
    complete: set[int] = field(default_factory=set[int])
    _events: asyncio.Queue[Json | None] = field(default_factory=asyncio.Queue[Json | None])
    _num_queued_bytes: int = 0

    @property
    def num_choices(self) -> int:
        return self.body["n"] * len(self.body.get("prompts", ("messages",)))

    async def events(self) -> AsyncGenerator[Json]:
        """Yield the trainer's events until the last one, or until the answer is abandoned. Before the first one, yield
        {"type": "waiting"} now and then, so that the API server knows that the worker is alive."""
        event: Json | None = {"type": "waiting"}
        while event is not None:
            try:
                async with asyncio.timeout(WAITING_SECONDS if event["type"] == "waiting" else None):
                    event = await self._events.get()
            except TimeoutError:
                event = {"type": "waiting"}
            if event is not None:
                self._num_queued_bytes -= _size(event)
                yield event

    def put(self, event: Json) -> None:
        self._num_queued_bytes += _size(event)
        if self._num_queued_bytes > MAX_QUEUED_BYTES:
            self.abandon()
        self._events.put_nowait(event)

    def abandon(self) -> None:
        """End `events`, because they have no reader."""
        self._events.put_nowait(None)


class Turns:
    """Requests that wait. The tenants take turns, so that no tenant's requests wait behind all those of another."""

    def __init__(self) -> None:
        self._of_tenant: OrderedDict[str, deque[OpenAnswer]] = OrderedDict()

    def __iter__(self) -> Any:
        return (answer for waiting in self._of_tenant.values() for answer in waiting)

    def __bool__(self) -> bool:
        return bool(self._of_tenant)

    def add(self, answer: OpenAnswer) -> None:
        self._of_tenant.setdefault(answer.tenant, deque()).append(answer)

    def next(self) -> OpenAnswer:
        tenant, waiting = self._of_tenant.popitem(last=False)
        answer = waiting.popleft()
        if waiting:
            self._of_tenant[tenant] = waiting
        return answer

    def remove(self, answer: OpenAnswer) -> None:
        waiting = self._of_tenant.get(answer.tenant, deque())
        if answer in waiting:
            waiting.remove(answer)
            if not waiting:
                del self._of_tenant[answer.tenant]


class SessionServer(Protocol):
    """The part of InferenceServer that a session uses."""

    def run(self, act: Callable[[], None]) -> None: ...

    def open(self, session: InferenceSession) -> None: ...


class InferenceSession:
    """The requests of one trainer."""

    def __init__(self, server: SessionServer, store: ArtifactStore, directory: TrainerDirectory) -> None:
        """For the main thread, like `open`, `close` and all attributes without an underscore."""
        self.secret = secrets.token_urlsafe(32)
        self.ready_at: float | None = None
        """When the trainer had loaded its base model, by the monotonic clock."""
        self.is_yielding = False
        """The trainer gets no new requests, because those for another base model wait."""
        self.has_suspect = False
        """The trainer holds a job that must train alone, so no request joins it."""
        self.fault: MalformedEvent | None = None
        """The trainer sent something that is no event."""
        self.last_event_at = -math.inf
        """When the trainer last sent an event here, by the monotonic clock."""
        self._server, self._store = server, store
        self._directory = directory
        self._is_closing = False
        self._waiting = {False: Turns(), True: Turns()}
        """By whether they are of batches."""
        self._open: dict[str, OpenAnswer] = {}
        """Requests that have had their turn."""
        self._staged: OrderedDict[str, asyncio.Task[StagedAdapter]] = OrderedDict()
        """Adapters in the trainer's directory, the most recently used last."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_answer_at = self._last_client_at = -math.inf
        self._pipes: WorkerPipes | None = None
        server.run(self._open_pipes)

    def _open_pipes(self) -> None:
        paths = (self._directory.requests_path, self._directory.tokens_path)
        self._pipes = WorkerPipes(*paths, receive=self._receive, fail=self._distrust)

    def open(self) -> None:
        """Accept requests from now on: the trainer is ready."""
        self.ready_at = time.monotonic()
        self._server.open(self)

    def regulate(self, *, has_suspect: bool | None = None, is_yielding: bool | None = None) -> None:
        """Change whether the trainer gets requests. None: as before."""
        before = (self.has_suspect, self.is_yielding)
        if has_suspect is not None:
            self.has_suspect = has_suspect
        if is_yielding is not None:
            self.is_yielding = is_yielding
        if (self.has_suspect, self.is_yielding) != before:
            self._server.run(self._advance)

    def stop_accepting(self) -> None:
        """Accept no more requests, because the trainer is to be unloaded. Those that wait go elsewhere."""
        self._is_closing = True
        self._server.run(self._return_waiting)

    def close(self) -> None:
        """Interrupt what the trainer has not answered, because it has exited or exits now. Repeatable."""
        if self._pipes is None:
            return
        self._is_closing = True
        self._server.run(self._close)

    @property
    def accepts(self) -> bool:
        return self.ready_at is not None and not (self._is_closing or self.is_yielding)

    @property
    def is_idle(self) -> bool:
        return not (self._open or self._waiting[False] or self._waiting[True])

    @property
    def has_clients(self) -> bool:
        """Whether clients wait for answers."""
        return bool(self._waiting[False]) or any(not answer.is_batch for answer in tuple(self._open.values()))

    @property
    def last_answer_at(self) -> float:
        """When the trainer last had a request, by the monotonic clock."""
        return self._last_answer_at if self.is_idle else time.monotonic()

    @property
    def last_client_at(self) -> float:
        """When it last had a request of a client that waits."""
        return time.monotonic() if self.has_clients else self._last_client_at

    # In the event loop

    def begin(self, body: Json, *, adapter: str | None, tenant: str, is_batch: bool) -> OpenAnswer:
        """Queue a request."""
        body = {**body, "is_batch": True} if is_batch else body
        answer = OpenAnswer(body=body, adapter=adapter, tenant=tenant, is_batch=is_batch)
        self._waiting[is_batch].add(answer)
        self._advance()
        return answer

    def stop(self, answer: OpenAnswer) -> None:
        """Stop answering. Repeatable."""
        self._waiting[answer.is_batch].remove(answer)
        if answer.request_id not in self._open:
            return
        self._forget(answer)
        if answer.is_sent and self._pipes is not None:
            self._pipes.send("stop_answering", {"request_id": answer.request_id})
        self._advance()

    def _advance(self) -> None:
        """Give the trainer as many requests as it may have. Those of batches come last."""
        if self._is_closing:
            return
        if self.is_yielding:
            self._return_waiting()
        for is_batch, waiting in self._waiting.items():
            while waiting and not self.has_suspect and self._has_place(is_batch=is_batch):
                answer = waiting.next()
                self._open[answer.request_id] = answer
                task = asyncio.create_task(self._send(answer))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _has_place(self, *, is_batch: bool) -> bool:
        same = [answer for answer in self._open.values() if answer.is_batch == is_batch]
        num_waiting = sum(answer.num_choices - len(answer.begun) for answer in same)
        if is_batch and _num_incomplete(same) >= MAX_BATCH_OPEN:
            return False
        return num_waiting < MAX_WAITING and _num_incomplete(self._open.values()) < MAX_OPEN

    async def _send(self, answer: OpenAnswer) -> None:
        """Give a request to the trainer, with its adapter, or fail it."""
        try:
            adapter = await self._stage(answer.adapter) if answer.adapter is not None else None
        except (DamagedArtifact, OutOfSpace, Unavailable, OSError) as error:
            log.warning("Adapter %s was not copied. %s", answer.adapter, error)
            self._receive({"type": "unanswered", "request_id": answer.request_id, "error": _shown(error)})
            return
        if answer.request_id in self._open and self._pipes is not None:
            self._pipes.send("answer", {**answer.body, "request_id": answer.request_id, "adapter": adapter})
            answer.is_sent = True

    async def _stage(self, digest: str) -> StagedAdapter:
        """Copy an adapter to the trainer's directory, unless it is there."""
        if digest not in self._staged:
            self._staged[digest] = asyncio.create_task(asyncio.to_thread(self._copy, digest))
            await self._remove_unused()
        self._staged.move_to_end(digest)
        try:
            return await asyncio.shield(self._staged[digest])
        except Exception:
            self._staged.pop(digest, None)
            raise

    def _copy(self, digest: str) -> StagedAdapter:
        folder = self._directory.path / "adapters" / digest
        shutil.rmtree(folder, ignore_errors=True)
        self._store.fetch(self._store.get_manifest(digest), folder)
        return {"digest": digest, "folder": self._directory.named(folder)}

    async def _remove_unused(self) -> None:
        used = {answer.adapter for answer in self._open.values()}
        unused = [digest for digest in self._staged if digest not in used]
        for oldest in unused[: max(0, len(self._staged) - STAGED_ADAPTERS)]:
            del self._staged[oldest]
            folder = self._directory.path / "adapters" / oldest
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _receive(self, event: Json) -> None:
        self.last_event_at = time.monotonic()
        answer = self._open.get(event.get("request_id", ""))
        if answer is None:
            return
        try:
            deltas: list[Json] = event.get("deltas", [])
            answer.begun.update(delta["index"] for delta in deltas)
            answer.complete.update(delta["index"] for delta in deltas if delta.get("finish") is not None)
            answer.put(event)
        except (KeyError, TypeError) as error:
            raise MalformedEvent(f"is an event of the type {event['type'][:40]!r} that can't be applied") from error
        if event["type"] in ("answered", "unanswered"):
            self._forget(answer)
        self._advance()

    def _forget(self, answer: OpenAnswer) -> None:
        del self._open[answer.request_id]
        self._last_answer_at = time.monotonic()
        if not answer.is_batch:
            self._last_client_at = self._last_answer_at

    def _distrust(self, error: MalformedEvent) -> None:
        self.fault = error

    def _return_waiting(self) -> None:
        for waiting in self._waiting.values():
            while waiting:
                waiting.next().put({"type": "unanswered", "error": _NOT_BEGUN})

    def _close(self) -> None:
        self._return_waiting()
        for answer in list(self._open.values()):
            self._forget(answer)
            answer.put({"type": "unanswered", "error": _INTERRUPTED if answer.is_sent else _NOT_BEGUN})
        for task in (*self._tasks, *self._staged.values()):
            task.cancel()
        if self._pipes is not None:
            self._pipes.close()
            self._pipes = None


def _num_incomplete(answers: Iterable[OpenAnswer]) -> int:
    return sum(answer.num_choices - len(answer.complete) for answer in answers)


def _size(event: Json) -> int:
    """Return about how many bytes an event takes."""
    return sum(len(delta.get("text", "")) + 64 * len(delta.get("logprobs", ())) for delta in event.get("deltas", ()))


def _shown(error: LorryError | OSError) -> Json:
    if isinstance(error, LorryError):
        return described(error)
    return {**ErrorText.of("adapter_not_copied").report()}
