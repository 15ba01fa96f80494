"""Sends requests to the engine that answers: a serving endpoint that is ready for the model, or else a trainer of a
worker that has the base model loaded. Both speak the HTTP API of vLLM's OpenAI-compatible server.

If a serving endpoint fails before the first token, a trainer answers. If a trainer is lost before the first token,
another one answers, once. Later, the client gets an error after which it can send the request again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool

from api.inference.answer import AnswerInterrupted, ClientGone, Delta, PartialAnswer, failure
from api.inference.calls import prompt_parameter
from api.inference.trainer_search import TrainerSearch
from api.inference.vllm_client import (
    CONNECTIONS_OF_PROJECT,
    MAX_CONNECTIONS,
    EndpointFailure,
    Json,
    ServerAddress,
    VllmClient,
    logprob_events,
    request_of,
)
from api.rate_limits.threads import ProjectSlots
from catalog.db.database import Database
from catalog.errors import LorryError, RateLimited
from catalog.inference import engines
from catalog.inference.engines import INTERRUPTED, NOT_BEGUN, TrainerAddress
from catalog.inference.requests import Model
from catalog.pepper import Pepper
from catalog.queue.notifier import Notifier
from catalog.serving import routes
from catalog.serving.probes import ProbeKind
from catalog.serving.routes import ServingRoute

WAIT_SECONDS = 600.0
"""How long a request may wait for its first token. OpenAI's clients wait as long for a response."""
AVOID_SECONDS = 1.0
"""How long a trainer is not asked again that accepts no requests, for example because it is about to be unloaded."""
MAX_LOST = 1
"""Trainers that may be lost before the first token of a request: the request may be the cause."""
MAX_OPEN = 1000
"""Maximum number of open requests of a project in one process."""
MAX_UNREAD = 64
"""Chunks that are read ahead of the client."""
FINISHES = frozenset({"stop", "length"})
"""Reasons with which a complete answer ends. vLLM also ends answers with `abort`, for example when it is paused."""
log = logging.getLogger("lorry.api")


@dataclass(kw_only=True, slots=True)
class EngineRequest:
    """A request of a client, a batch or a verification. gone: set once the answer has no recipient any more."""

    project_id: str
    model: Model
    parameters: Json
    """With all defaults; see calls.py."""
    gone: asyncio.Event
    is_batch: bool = False
    wait_seconds: float = WAIT_SECONDS

    @property
    def kind(self) -> ProbeKind:
        return "chat" if "messages" in self.parameters else "text"


class Engines:
    """Sends the requests of this process. For one event loop."""

    def __init__(
        self,
        db: Database,
        *,
        pepper: Pepper,
        notifier: Notifier,
        client: VllmClient,
    ) -> None:
        self._db, self._pepper, self._notifier, self._client = db, pepper, notifier, client
        self.on_endpoint_lost: Callable[[], None] = lambda: None
        """Called when a serving endpoint has failed to answer."""
        self._num_open: Counter[str] = Counter()
        """Requests of clients, by project."""
        self._slots = ProjectSlots(MAX_CONNECTIONS, per_project=CONNECTIONS_OF_PROJECT)
        """Connections to engines. A request that waits for a trainer has none, so it delays no other project."""
        self._searches: dict[str, TrainerSearch] = {}
        """By pack key."""

    async def close(self) -> None:
        await self._client.close()

    @asynccontextmanager
    async def answering(
        self, request: EngineRequest, answer: PartialAnswer, *, only_built_in: bool = False
    ) -> AsyncGenerator[AsyncGenerator[Delta]]:
        """Yield what is added to the answer. Raises ClientGone and LorryError.

        only_built_in: no serving endpoint answers.
        """
        with self._counted(request):
            route = None if only_built_in or _uses_tools(request.parameters) else await self._route(request)
            if route is not None:
                async with self._to_endpoint(request, route) as stream:
                    lost = await stream.begin(request.wait_seconds, answer)
                    if lost is None:
                        answer.engine = route.endpoint_name
                        yield stream.deltas(answer)
                        return
                await self._note(route, lost)
            async with self._from_trainer(request, answer) as stream:
                yield stream.deltas(answer)

    @contextmanager
    def _counted(self, request: EngineRequest) -> Generator[None]:
        """Raises RateLimited. Batches have limits of their own, and their lines wait."""
        if request.is_batch:
            yield
            return
        project_id = request.project_id
        if self._num_open[project_id] >= MAX_OPEN:
            raise RateLimited("too_many_inference_requests", max_open=MAX_OPEN, retry_after_seconds=1, headers={})
        self._num_open[project_id] += 1
        try:
            yield
        finally:
            self._num_open[project_id] -= 1
            if not self._num_open[project_id]:
                del self._num_open[project_id]

    async def _route(self, request: EngineRequest) -> ServingRoute | None:
        model = request.model
        find = partial(routes.route_of, self._db, model=model.name, base_digest=model.base_digest)
        return await run_in_threadpool(partial(find, kind=request.kind, pepper=self._pepper))

    @asynccontextmanager
    async def _to_endpoint(self, request: EngineRequest, route: ServingRoute) -> AsyncGenerator[Stream]:
        server = ServerAddress(url=route.url, api_key=route.api_key)
        salt, settings = self._tenant(request), route.settings
        path, body = request_of(request.parameters, served_model=route.served_model, settings=settings, cache_salt=salt)
        async with (
            self._slots.slot(request.project_id),
            Stream(self._client, server, path, body, gone=request.gone) as stream,
        ):
            yield stream

    def _tenant(self, request: EngineRequest) -> str:
        return self._pepper.digest(f"prefixes of {request.project_id}")

    async def _note(self, route: ServingRoute, lost: EndpointFailure) -> None:
        """Record that the endpoint or the adapter is lost. After other errors, a trainer answers only this request: it
        may be too long for the server, for example."""
        log.warning("serving endpoint=%s request: %s", route.endpoint_id, lost.message)
        if lost.kind == "refused":
            return
        concerns_adapter = lost.kind == "missing" and route.deployment_id is not None
        note = partial(routes.note_lost, self._db, route, error=lost.message, concerns_adapter=concerns_adapter)
        with suppress(LorryError):
            await run_in_threadpool(note)
        self.on_endpoint_lost()

    @asynccontextmanager
    async def _from_trainer(self, request: EngineRequest, answer: PartialAnswer) -> AsyncGenerator[Stream]:
        """Yield the stream of a trainer that has begun to answer."""
        loop = asyncio.get_running_loop()
        until, num_lost = loop.time() + request.wait_seconds, 0
        avoided: dict[str, float] = {}
        """Until when, by the trainer's id."""
        while True:
            trainer = await self._trainer(request, avoided, until=until)
            server = ServerAddress(url=f"http://{trainer.address}", api_key=trainer.secret)
            path, body = request_of(
                request.parameters,
                served_model=request.model.name,
                settings=None,
                adapter=request.model.adapter,
                tenant=self._tenant(request),
                priority=int(request.is_batch),
            )
            async with (
                self._slots.slot(request.project_id),
                Stream(self._client, server, path, body, gone=request.gone) as stream,
            ):
                try:
                    lost = await stream.begin(until - loop.time(), answer)
                except TimeoutError:
                    raise await self._why_unanswered(request) from None
                if lost is None:
                    yield stream
                    return
            avoided[trainer.trainer_id] = loop.time() + AVOID_SECONDS
            code = lost.error.get("code") if lost.error is not None else None
            if not stream.is_accepted or code == NOT_BEGUN:
                if lost.kind != "unreachable":
                    log.warning("trainer=%s accepts no requests: %s", trainer.trainer_id, lost.message)
                continue
            if lost.error is not None and code != INTERRUPTED:
                raise failure(lost.error, prompt=prompt_parameter(request.parameters))
            log.warning("trainer=%s was lost: %s", trainer.trainer_id, lost.message)
            num_lost += 1
            if num_lost > MAX_LOST:
                raise _interrupted("The trainers that began to answer were lost.")

    async def _trainer(self, request: EngineRequest, avoided: dict[str, float], *, until: float) -> TrainerAddress:
        """Return a trainer that has the base model loaded, as soon as there is one."""
        loop, model, gone = asyncio.get_running_loop(), request.model, request.gone
        found, _ = await run_in_threadpool(engines.trainers_of, self._db, model.pack_key)
        while True:
            usable = [each for each in found if avoided.get(each.trainer_id, 0.0) <= loop.time()]
            if usable:
                return random.choice(usable)  # noqa: S311  (no secret)
            if found:
                await _first_of(gone.wait(), seconds=AVOID_SECONDS)
            search = self._searches.get(model.pack_key)
            if search is None or search.is_over:
                wake = self._notifier.wake_workers
                search = self._searches[model.pack_key] = TrainerSearch(self._db, model, wake_workers=wake)
            searching = search.join(is_batch=request.is_batch)
            try:
                await _first_of(searching, gone.wait(), seconds=until - loop.time())
                if gone.is_set():
                    raise ClientGone
                if not searching.done():
                    raise await self._why_unanswered(request)
                found = searching.result()
            finally:
                searching.cancel()

    async def _why_unanswered(self, request: EngineRequest) -> LorryError:
        return await run_in_threadpool(engines.why_unanswered, self._db, request.model)


class Stream:
    """The chunks of a server's answer. A task of their own reads them, because a connection must be closed by the task
    that opened it."""

    def __init__(
        self, client: VllmClient, server: ServerAddress, path: str, body: Json, *, gone: asyncio.Event
    ) -> None:
        self.is_accepted = False
        """The server has accepted the request."""
        self._is_chat = "messages" in body
        self._chunks: asyncio.Queue[Json | EndpointFailure | None] = asyncio.Queue(maxsize=MAX_UNREAD)
        """None follows the last chunk."""
        self._first: list[Delta] = []
        self._counts: dict[int, int] = {}
        """Tokens of each choice so far."""
        self._gone = gone
        self._work = self._read(client, server, path, body)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Stream:
        self._task = asyncio.create_task(self._work)
        return self

    async def __aexit__(self, *_raised: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def begin(self, seconds: float, answer: PartialAnswer) -> EndpointFailure | None:
        """Wait for the first token. Returns why there is none. Raises ClientGone, TimeoutError, and LorryError.

        The first chunk of a worker has no token: it reports that the trainer has begun.
        """
        async with asyncio.timeout(seconds):
            while True:
                found = await self._next()
                if found is None:
                    found = EndpointFailure("The server's answer is empty.", kind="refused")
                if isinstance(found, EndpointFailure):
                    answer.has_begun, answer.prompt_tokens = False, 0
                    return found
                self._first, answer.has_begun = self._parsed(found, answer), True
                if found.get("choices"):
                    return None

    async def deltas(self, answer: PartialAnswer) -> AsyncGenerator[Delta]:
        """Yield what each chunk adds. Raises ClientGone, and LorryError if the answer is interrupted."""
        deltas = self._first
        while True:
            for delta in deltas:
                if delta.text or delta.logprobs or delta.finish:
                    yield delta
            chunk = await self._next()
            if chunk is None:
                return
            if isinstance(chunk, EndpointFailure):
                raise _ended(chunk, is_chat=self._is_chat)
            deltas = self._parsed(chunk, answer)

    def _parsed(self, chunk: Json, answer: PartialAnswer) -> list[Delta]:
        """Return what a chunk adds, and note the tokens so far."""
        try:
            deltas = [self._delta(choice) for choice in chunk.get("choices") or ()]
            self._note_usage(chunk, answer)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _interrupted("The server sent a chunk in another format.") from error
        return deltas

    def _delta(self, choice: Json) -> Delta:
        finish: str | None = choice.get("finish_reason")
        if finish is not None and finish not in FINISHES:
            raise _interrupted(f"The server ended it with the reason {finish!r}.")
        part: Json = (choice.get("delta") or {}) if self._is_chat else choice
        text: str | None = part.get("content" if self._is_chat else "text")
        return Delta(
            index=int(choice["index"]),
            text=text or "",
            logprobs=logprob_events(choice, is_chat=self._is_chat),
            finish=finish,
        )

    def _note_usage(self, chunk: Json, answer: PartialAnswer) -> None:
        """Note the tokens so far. Those of a chunk with choices are of its choice alone."""
        answer.generation = chunk.get("generation", answer.generation)
        usage: Json | None = chunk.get("usage")
        if not usage:
            return
        choices: list[Json] = chunk.get("choices") or []
        number = max(0, int(usage.get("completion_tokens") or 0))
        if choices:
            self._counts[int(choices[0]["index"])] = number
            number = sum(self._counts.values())
        answer.prompt_tokens, answer.completion_tokens = max(0, int(usage["prompt_tokens"])), number

    async def _next(self) -> Json | EndpointFailure | None:
        following = asyncio.ensure_future(self._chunks.get())
        try:
            await _first_of(following, self._gone.wait())
            if not following.done():
                raise ClientGone
            return following.result()
        finally:
            following.cancel()

    async def _read(self, client: VllmClient, server: ServerAddress, path: str, body: Json) -> None:
        try:
            async with client.answering(server, path, body) as chunks:
                self.is_accepted = True
                async for chunk in chunks:
                    await self._chunks.put(chunk)
            await self._chunks.put(None)
        except EndpointFailure as lost:
            await self._chunks.put(lost)
        except Exception:
            log.exception("crash in the answer of an engine")
            await self._chunks.put(EndpointFailure("The server's answer could not be read.", kind="refused"))


def _uses_tools(prompt: Json) -> bool:
    """Return whether the prompt depends on how tools are rendered, which servers do in their own ways."""
    messages: list[Json] = prompt.get("messages", [])
    return "tools" in prompt or any(row.get("tool_calls") or row["role"] == "tool" for row in messages)


async def _first_of(*awaited: Any, seconds: float | None = None) -> None:
    """Wait until one of them is done, or for `seconds`. Coroutines are cancelled afterwards, futures are not."""
    tasks = {each: asyncio.ensure_future(each) for each in awaited}
    limit = None if seconds is None else max(0.0, seconds)
    try:
        await asyncio.wait(tasks.values(), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for given, task in tasks.items():
            if task is not given:
                task.cancel()


def _ended(lost: EndpointFailure, *, is_chat: bool) -> LorryError:
    """Return the error for the client after an answer has begun."""
    if lost.error is not None and lost.error.get("code") != INTERRUPTED:
        return failure(lost.error, prompt="messages" if is_chat else "prompt")
    return _interrupted(lost.message)


def _interrupted(reason: str) -> AnswerInterrupted:
    """Return the error for the client. reason: only for the log, because it contains text of the server."""
    log.warning("interrupted answer: %s", reason)
    return AnswerInterrupted("answer_interrupted")
