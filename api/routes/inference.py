"""/v1/chat/completions and /v1/completions: answers of base models, adapters and checkpoints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from api.auth.authentication import Identity, Recheck, Signed
from api.deps import Services, Use
from api.errors.handlers import refusal
from api.inference.answer import ClientGone, Delta, PartialAnswer
from api.inference.calls import CompletionCall, chat_call, text_call
from api.inference.exchange import EngineRequest
from api.inference.responses import DONE, chunks, error_message, whole
from api.rate_limits.threads import run_route
from api.requests.disconnects import set_when_disconnected
from api.routes import SIGNED, errors
from api.routing import Router
from api.schemas.inference import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    SamplingRequest,
)
from api.streaming.hub import RECHECK_SECONDS
from api.streaming.sse import HEADERS
from catalog.errors import LorryError
from catalog.inference import requests
from catalog.tenancy.authentication import Caller

SEND_SECONDS = 60.0
"""How long a client may take to read what was sent before the stream is abandoned."""
ENGINE_HEADER = "x-lorry-engine"
"""Header of an answer: `built-in`, or the name of the serving endpoint that answered."""
router = Router(prefix="/v1", tags=["inference"], responses=SIGNED)
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {}},
        "description": "The answer, or its chunks.",
        "headers": {
            ENGINE_HEADER: {
                "description": "Engine that answered: `built-in`, or the name of a serving endpoint.",
                "schema": {"type": "string"},
            }
        },
    }
}


@router.post(
    "/chat/completions",
    operation_id="create_chat_completion",
    response_model=ChatCompletion,
    response_model_exclude_none=False,
    responses=errors(404, 409) | STREAM,
)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, use: Use, caller: Signed, recheck: Recheck
) -> Response:
    """Answer a conversation with a base model, an adapter or a checkpoint.

    With tools, a streamed answer is sent once it is complete, because only then its calls are known. Requires the scope
    `models:answer`.
    """
    call = chat_call(body)
    return await _respond(use, caller, request, call, body, recheck=recheck)


@router.post(
    "/completions",
    operation_id="create_completion",
    response_model=Completion,
    responses=errors(404, 409) | STREAM,
)
async def create_completion(
    body: CompletionRequest, request: Request, use: Use, caller: Signed, recheck: Recheck
) -> Response:
    """Continue a text, or up to 16 texts, without a chat template. A request gets at most 64 answers.

    Requires the scope `models:answer`.
    """
    call = text_call(body)
    return await _respond(use, caller, request, call, body, recheck=recheck)


async def _respond(
    use: Services,
    caller: Caller,
    request: Request,
    call: CompletionCall,
    body: SamplingRequest,
    *,
    recheck: Identity,
) -> Response:
    project_id = caller.project_id
    find = partial(requests.resolve, use.db, project_id=project_id, name=body.model)
    model = await run_route(project_id, find)
    if call.parameters.get("tools"):
        model.check_tools()
    await run_route(project_id, partial(requests.check_quota, use.db, project_id=project_id))
    exchange = _Exchange(use, project_id, request.receive, model, call)
    if body.stream:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return CompletionStream(exchange, n=call.num_choices, with_usage=with_usage, recheck=recheck)
    answer = PartialAnswer()
    try:
        async with exchange.answering(answer) as deltas:
            found = await whole(deltas, answer, exchange.form, n=call.num_choices)
    except ClientGone:
        return Response(status_code=499)
    return Response(found, media_type="application/json", headers={ENGINE_HEADER: answer.engine})


class _Exchange:
    """One request of a client, until it is answered or the client is gone."""

    def __init__(
        self, use: Services, project_id: str, receive: Receive, model: requests.Model, call: CompletionCall
    ) -> None:
        self.form = call.form(model)
        self._use, self._project_id, self._receive, self._model, self._call = use, project_id, receive, model, call

    @asynccontextmanager
    async def answering(self, answer: PartialAnswer) -> AsyncGenerator[AsyncGenerator[Delta]]:
        """Yield what is added to the answer. Afterwards its tokens are counted. Raises ClientGone and LorryError."""
        gone = asyncio.Event()
        request = EngineRequest(
            project_id=self._project_id, model=self._model, parameters=self._call.parameters, gone=gone
        )
        watch = asyncio.create_task(set_when_disconnected(self._receive, gone))
        try:
            async with self._use.engines.answering(request, answer) as deltas:
                yield deltas
        finally:
            watch.cancel()
            count = partial(
                requests.count,
                self._use.db,
                project_id=self._project_id,
                model=self._model,
                response_id=self.form.response_id,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
            )
            with suppress(LorryError):
                await asyncio.shield(run_route(self._project_id, count))


class _StalledClient(Exception):
    """The client is connected, but reads nothing."""


class CompletionStream(Response):
    """The chunks of an answer as server-sent events, in OpenAI's format. An error before the first chunk is an ordinary
    error response. The answer ends if the key of the request is revoked."""

    def __init__(self, exchange: _Exchange, *, n: int, with_usage: bool, recheck: Identity) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._exchange = exchange
        self._n = n
        self._with_usage = with_usage
        self._recheck = recheck
        self._checked_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(_StalledClient):  # the server closes the connection of an incomplete response
            await self._send_all(scope, receive, partial(_send_in_time, send))

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer, has_begun = PartialAnswer(), False
        try:
            async with self._exchange.answering(answer) as deltas:
                parts = chunks(deltas, answer, self._exchange.form, n=self._n, with_usage=self._with_usage)
                async for part in parts:
                    if not has_begun:
                        self.headers[ENGINE_HEADER] = answer.engine
                        await send(
                            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                        )
                        has_begun = True
                    await self._check_access()
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except ClientGone:
            if not has_begun:
                await Response(status_code=499)(scope, receive, send)
                return
        except LorryError as error:
            if not has_begun:
                await refusal(error)(scope, receive, send)
                return
            told = {"message": error.sentence(), "type": error.type, "param": error.param, "code": error.code}
            await send({"type": "http.response.body", "body": error_message(told), "more_body": True})
        else:
            await send({"type": "http.response.body", "body": DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _check_access(self) -> None:
        """Raise Unauthorized if the last check is long ago and the key is no longer valid."""
        if time.monotonic() - self._checked_at < RECHECK_SECONDS:
            return
        self._checked_at = time.monotonic()
        try:
            await run_in_threadpool(self._recheck.identify)
        except LorryError as error:
            if error.status < 500:  # otherwise it is not known
                raise


async def _send_in_time(send: Send, message: Message) -> None:
    """Send a message. Raises _StalledClient if the client does not read the earlier ones in time."""
    try:
        async with asyncio.timeout(SEND_SECONDS):
            await send(message)
    except TimeoutError as error:
        raise _StalledClient from error
