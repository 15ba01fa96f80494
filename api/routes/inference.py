"""/v1/chat/completions and /v1/completions: answers of base models, adapters and checkpoints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from api.auth.authentication import Identity, Recheck, Signed
from api.deps import Services, Use
from api.errors.handlers import refusal
from api.inference.answer import ClientGone, Delta, PartialAnswer, deltas_of
from api.inference.calls import chat_call, prompt_parameter, text_call
from api.inference.replies import Reply
from api.inference.responses import DONE, ChatFormat, TextFormat, chunks, error_message, whole
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
from api.serving.exchange import Exchange, RoutedExchange
from api.streaming.hub import RECHECK_SECONDS
from api.streaming.sse import HEADERS
from catalog.errors import LorryError
from catalog.inference import requests
from catalog.serving import routes
from catalog.serving.probes import ProbeKind
from catalog.serving.routes import ServingRoute
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
    model, route = await run_route(caller.project_id, partial(_resolve, use, caller, body.model, "chat"))
    if call.parameters.get("tools"):
        model.check_tools()
    form = call.form(model)
    exchange = _Exchange(use, caller, request, model, call.parameters)
    routed = exchange if _uses_tools(call.parameters) else exchange.routed(route, form.response_id)
    return await _respond(routed, form, body, n=call.num_choices, recheck=recheck)


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
    model, route = await run_route(caller.project_id, partial(_resolve, use, caller, body.model, "text"))
    form = call.form(model)
    exchange = _Exchange(use, caller, request, model, call.parameters).routed(route, form.response_id)
    return await _respond(exchange, form, body, n=call.num_choices, recheck=recheck)


def _resolve(use: Services, caller: Caller, name: str, kind: ProbeKind) -> tuple[requests.Model, ServingRoute | None]:
    """Return the model and, if one is ready for it, the serving endpoint that answers."""
    model = requests.resolve(use.db, project_id=caller.project_id, name=name)
    digest = model.base_digest
    return model, routes.route_of(use.db, model=model.name, base_digest=digest, kind=kind, pepper=use.pepper)


def _uses_tools(prompt: dict[str, Any]) -> bool:
    """Return whether the prompt depends on how tools are rendered, which servers do in their own ways."""
    return "tools" in prompt or any(row.get("tool_calls") or row["role"] == "tool" for row in prompt["messages"])


class _Exchange:
    """A request for the built-in engine, with its row in the database, which exists while the client waits."""

    def __init__(
        self, use: Services, caller: Caller, request: Request, model: requests.Model, parameters: dict[str, Any]
    ) -> None:
        self._use = use
        self._caller = caller
        self._receive = request.receive
        self._model = model
        self._parameters = parameters

    def routed(self, route: ServingRoute | None, response_id: str) -> Exchange:
        """Return the same request for a serving endpoint, or this one if there is none."""
        if route is None:
            return self
        return RoutedExchange(
            self._use,
            self._caller,
            self._receive,
            model=self._model,
            route=route,
            parameters=self._parameters,
            response_id=response_id,
            own=self,
        )

    @asynccontextmanager
    async def answering(self, answer: PartialAnswer) -> AsyncGenerator[AsyncGenerator[Delta]]:
        """Yield what the worker adds to the answer. Afterwards the row is deleted, and the worker stops."""
        use, project_id = self._use, self._caller.project_id
        submit = partial(
            requests.submit,
            use.db,
            project_id=project_id,
            model=self._model,
            body=self._parameters,
            reply_to=use.replies.address,
        )
        gone = asyncio.Event()
        reply: Reply | None = None
        row = await run_route(project_id, submit)
        watch = asyncio.create_task(set_when_disconnected(self._receive, gone))
        try:
            reply = use.replies.open(row.id)
            reply.is_submitted = True
            use.notifier.wake_workers()
            why = partial(requests.why_unanswered, use.db, row.id)
            prompt = prompt_parameter(self._parameters)
            async with aclosing(deltas_of(reply, answer, gone=gone, why_unanswered=why, prompt=prompt)) as deltas:
                yield deltas
        finally:
            watch.cancel()
            if reply is not None:
                reply.close()
            counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
            with suppress(LorryError):  # recovery deletes it
                await asyncio.shield(run_route(project_id, partial(requests.finish, use.db, row.id, **counts)))


async def _respond(
    exchange: Exchange, form: ChatFormat | TextFormat, body: SamplingRequest, *, n: int, recheck: Identity
) -> Response:
    if body.stream:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return CompletionStream(exchange, form, n=n, with_usage=with_usage, recheck=recheck)
    answer = PartialAnswer()
    try:
        async with exchange.answering(answer) as deltas:
            found = await whole(deltas, answer, form, n=n)
    except ClientGone:
        return Response(status_code=499)
    return Response(found, media_type="application/json", headers={ENGINE_HEADER: answer.engine})


class _StalledClient(Exception):
    """The client is connected, but reads nothing."""


class CompletionStream(Response):
    """The chunks of an answer as server-sent events, in OpenAI's format. An error before the first chunk is an ordinary
    error response. The answer ends if the key of the request is revoked."""

    def __init__(
        self, exchange: Exchange, form: ChatFormat | TextFormat, *, n: int, with_usage: bool, recheck: Identity
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._exchange = exchange
        self._form = form
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
                parts = chunks(deltas, answer, self._form, n=self._n, with_usage=self._with_usage)
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
