"""Sends requests to a serving endpoint, and to the built-in engine if it fails before the first token.

The endpoint's chunks become the same deltas as a worker's, so responses have the same form whichever engine answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Protocol

from starlette.types import Receive

from api.deps import Services
from api.inference.answer import AnswerInterrupted, ClientGone, Delta, PartialAnswer
from api.rate_limits.threads import run_route
from api.requests.disconnects import set_when_disconnected
from api.serving.vllm_client import EndpointFailure, Json, ServerAddress, logprob_events, request_of
from catalog.errors import LorryError
from catalog.inference import requests
from catalog.serving import routes
from catalog.serving.routes import ServingRoute
from catalog.tenancy.authentication import Caller

MAX_UNREAD = 64
"""Chunks that are read ahead of the client."""
FINISHES = frozenset({"stop", "length"})
"""Reasons with which a complete answer ends. vLLM also ends answers with `abort`, for example when it is paused."""
log = logging.getLogger("lorry.api")


class Exchange(Protocol):
    """One request of a client, which an engine answers."""

    def answering(self, answer: PartialAnswer) -> AbstractAsyncContextManager[AsyncGenerator[Delta]]:
        """Yield what is added to the answer."""
        ...


class RoutedExchange:
    """A request for which there is a serving endpoint. own: the same request for the built-in engine."""

    def __init__(
        self,
        use: Services,
        caller: Caller,
        receive: Receive,
        *,
        model: requests.Model,
        route: ServingRoute,
        parameters: Json,
        response_id: str,
        own: Exchange,
    ) -> None:
        self._use, self._caller, self._receive = use, caller, receive
        self._model, self._route, self._parameters = model, route, parameters
        self._response_id = response_id
        self._own = own

    @asynccontextmanager
    async def answering(self, answer: PartialAnswer) -> AsyncGenerator[AsyncGenerator[Delta]]:
        """Yield what is added to the answer. Afterwards its tokens are counted. Raises ClientGone and QuotaExceeded."""
        project_id = self._caller.project_id
        await run_route(project_id, partial(requests.check_quota, self._use.db, project_id=project_id))
        async with _EndpointAnswer(self._use, self._route, self._parameters, self._receive, project_id) as stream:
            failure = await stream.begin()
            if failure is None:
                answer.engine = self._route.endpoint_name
                try:
                    yield stream.deltas(answer)
                finally:
                    await self._count(answer)
                return
        await self._note(failure)
        async with self._own.answering(answer) as deltas:
            yield deltas

    async def _note(self, failure: EndpointFailure) -> None:
        """Record that the endpoint or the adapter is lost. After other errors, the built-in engine answers only this
        request: it may be too long for the server, for example."""
        log.warning("serving endpoint=%s request: %s", self._route.endpoint_id, failure.message)
        if failure.kind == "refused":
            return
        concerns_adapter = failure.kind == "missing" and self._route.deployment_id is not None
        with suppress(LorryError):
            lost = partial(routes.note_lost, self._use.db, self._route, error=failure.message)
            await run_route(self._caller.project_id, partial(lost, concerns_adapter=concerns_adapter))
        self._use.keepers.wake()

    async def _count(self, answer: PartialAnswer) -> None:
        count = partial(
            requests.count,
            self._use.db,
            project_id=self._caller.project_id,
            model=self._model,
            response_id=self._response_id,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
        )
        with suppress(LorryError):
            await asyncio.shield(run_route(self._caller.project_id, count))


class _EndpointAnswer:
    """The chunks of a server's answer. A task of their own reads them, because a connection must be closed by the task
    that opened it."""

    def __init__(self, use: Services, route: ServingRoute, parameters: Json, receive: Receive, project_id: str) -> None:
        server = ServerAddress(url=route.url, api_key=route.api_key)
        salt = use.pepper.digest(f"prefixes of {project_id}")
        path, body = request_of(parameters, served_model=route.served_model, settings=route.settings, cache_salt=salt)
        self._is_chat = "messages" in parameters
        self._chunks: asyncio.Queue[Json | EndpointFailure | None] = asyncio.Queue(maxsize=MAX_UNREAD)
        """None follows the last chunk."""
        self._first: Json | None = None
        self._counts: dict[int, int] = {}
        """Tokens of each choice so far."""
        self._gone = asyncio.Event()
        self._work = (self._read(use, server, path, body, project_id), set_when_disconnected(receive, self._gone))
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> _EndpointAnswer:
        self._tasks = [asyncio.create_task(work) for work in self._work]
        return self

    async def __aexit__(self, *_raised: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def begin(self) -> EndpointFailure | None:
        """Wait for the first chunk. Returns why there is none. Raises ClientGone."""
        found = await self._next()
        if isinstance(found, EndpointFailure):
            return found
        if found is None:
            return EndpointFailure("The server's answer is empty.", kind="refused")
        self._first = found
        return None

    async def deltas(self, answer: PartialAnswer) -> AsyncGenerator[Delta]:
        """Yield what each chunk adds. Raises ClientGone, and AnswerInterrupted if the answer is interrupted."""
        answer.has_begun = True
        chunk: Json | EndpointFailure | None = self._first
        while chunk is not None:
            if isinstance(chunk, EndpointFailure):
                raise _interrupted(chunk.message)
            try:
                deltas = [self._delta(choice) for choice in chunk.get("choices") or ()]
                self._note_usage(chunk, answer)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise _interrupted("The server sent a chunk in another format.") from error
            for delta in deltas:
                if delta.text or delta.logprobs or delta.finish:
                    yield delta
            chunk = await self._next()

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
        leaving = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait((following, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                raise ClientGone
            return following.result()
        finally:
            following.cancel()
            leaving.cancel()

    async def _read(self, use: Services, server: ServerAddress, path: str, body: Json, project_id: str) -> None:
        try:
            async with use.endpoint_slots.slot(project_id), use.vllm.answering(server, path, body) as chunks:
                async for chunk in chunks:
                    await self._chunks.put(chunk)
            await self._chunks.put(None)
        except EndpointFailure as failure:
            await self._chunks.put(failure)
        except Exception:
            log.exception("crash in the answer of a serving endpoint")
            await self._chunks.put(EndpointFailure("The server's answer could not be read.", kind="refused"))


def _interrupted(reason: str) -> AnswerInterrupted:
    """Return the error for the client. reason: only for the log, because it contains text of the server."""
    log.warning("serving interrupted answer: %s", reason)
    return AnswerInterrupted(
        "The serving endpoint did not complete the answer.",
        code="answer_interrupted",
        remedy="Send the request again.",
    )
