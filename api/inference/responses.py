"""Turns answers into OpenAI's objects: whole completions, and chunks of a stream."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, Literal

from api.inference.answer import Delta, Json, PartialAnswer
from api.schemas.inference import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    FunctionCallObject,
    TextChoice,
    TextLogprobs,
    ToolCallObject,
    Usage,
)
from catalog.inference import answer_format
from catalog.inference.answer_format import text_logprobs

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseHead:
    """The fields that all objects of one response share."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def head_of(prefix: Literal["chatcmpl", "cmpl"], *, model: str, base_digest: str) -> ResponseHead:
    return ResponseHead(
        id=f"{prefix}-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=model,
        system_fingerprint=f"fp_{base_digest[:12]}",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    text: str
    logprobs: list[Json]
    finish: str


@dataclass(kw_only=True, slots=True)
class _GrowingChoice:
    """A choice that is not complete, in a compact form: as objects, log-probabilities need five times the memory."""

    text: StringIO = field(default_factory=StringIO)
    logprobs: bytearray = field(default_factory=bytearray)
    """JSON objects, each followed by a comma."""
    finish: str = "stop"

    def add(self, delta: Delta, answer: PartialAnswer) -> None:
        answer.keep(len(delta.text))
        self.text.write(delta.text)
        if delta.logprobs:
            encoded = json.dumps(delta.logprobs, separators=(",", ":")).encode()[1:-1] + b","
            answer.keep(len(encoded), of="logprobs")
            self.logprobs += encoded
        self.finish = delta.finish or self.finish

    def complete(self) -> _Choice:
        logprobs = json.loads(b"[" + self.logprobs[:-1] + b"]")
        return _Choice(text=self.text.getvalue(), logprobs=logprobs, finish=self.finish)


async def whole(deltas: AsyncIterable[Delta], answer: PartialAnswer, form: ChatFormat | TextFormat, *, n: int) -> str:
    """Return the completion as JSON, once it is complete. Raises InvalidRequest if it is too large."""
    choices = [_GrowingChoice() for _ in range(n)]
    async for delta in deltas:
        choices[delta.index].add(delta, answer)

    def serialize() -> str:
        completion = form.whole([choice.complete() for choice in choices], usage_of(answer))
        return completion.model_dump_json(exclude_none=False)

    return await asyncio.to_thread(serialize)  # a large answer takes long enough to delay the streams of other clients


def usage_of(answer: PartialAnswer) -> Usage:
    total = answer.prompt_tokens + answer.completion_tokens
    return Usage(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens, total_tokens=total)


async def chunks(
    deltas: AsyncIterable[Delta], answer: PartialAnswer, form: ChatFormat | TextFormat, *, n: int, with_usage: bool
) -> AsyncGenerator[bytes]:
    """Yield the messages of a stream, except the last one, DONE."""
    usage: Json = {"usage": None} if with_usage else {}
    is_open = False
    async for delta in deltas:
        for choice in form.opening(n) if not is_open else ():  # an error before this is an ordinary response
            yield _message(form.chunk([choice]) | usage)
        is_open = True
        for choice in form.parts(delta):
            yield _message(form.chunk([choice]) | usage)
    if with_usage:
        yield _message(form.chunk([]) | {"usage": usage_of(answer).model_dump()})


def _message(chunk: Json) -> bytes:
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def error_message(error: Json) -> bytes:
    """Return the message of an error after the stream has begun."""
    return _message({"error": error})


class ChatFormat:
    """Objects of /v1/chat/completions.

    tools: names of the functions that the model may call. max_calls: further calls of an answer are omitted; None: no
    maximum.
    """

    def __init__(
        self, head: ResponseHead, *, tools: frozenset[str], with_logprobs: bool, max_calls: int | None = None
    ) -> None:
        self._head = head
        self._max_calls = max_calls
        self.response_id = head.id
        self._tools = tools
        self._with_logprobs = with_logprobs
        self._held: dict[int, str] = {}
        """Text of choices that may turn out to be a tool call."""

    def whole(self, choices: Sequence[_Choice], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.system_fingerprint,
            choices=[self._choice(index, choice) for index, choice in enumerate(choices)],
            usage=usage,
        )

    def _choice(self, index: int, choice: _Choice) -> ChatChoice:
        text, calls = self._parsed(choice.text)
        message = AssistantMessage(content=text or (None if calls else ""), tool_calls=calls or None)
        logprobs = None
        if self._with_logprobs:
            logprobs = ChatLogprobs(content=[ChatTokenLogprob.model_validate(token) for token in choice.logprobs])
        finish: Any = "tool_calls" if calls and choice.finish == "stop" else choice.finish
        return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=finish)

    def _parsed(self, text: str) -> tuple[str, list[ToolCallObject]]:
        if not self._tools:
            return text, []
        rest, calls = answer_format.parse(text, names=self._tools)
        return rest, [
            ToolCallObject(
                id=f"call_{secrets.token_hex(12)}",
                function=FunctionCallObject(name=call.name, arguments=call.arguments),
            )
            for call in calls[: self._max_calls]
        ]

    def chunk(self, choices: list[Json]) -> Json:
        return {
            "id": self._head.id,
            "object": "chat.completion.chunk",
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.system_fingerprint,
            "choices": choices,
        }

    def opening(self, n: int) -> list[Json]:
        """Return the parts before the first token."""
        return [self._part(index, {"role": "assistant", "content": ""}) for index in range(n)]

    def parts(self, delta: Delta) -> list[Json]:
        logprobs = {"content": delta.logprobs, "refusal": None} if self._with_logprobs and delta.logprobs else None
        if self._tools:  # a tool call is recognized once it is complete
            return self._held_parts(delta, logprobs)
        found: list[Json] = []
        if delta.text or logprobs:
            found.append(self._part(delta.index, {"content": delta.text}, logprobs=logprobs))
        if delta.finish:
            found.append(self._part(delta.index, {}, finish=delta.finish))
        return found

    def _held_parts(self, delta: Delta, logprobs: Json | None) -> list[Json]:
        self._held[delta.index] = self._held.get(delta.index, "") + delta.text
        found = [self._part(delta.index, {}, logprobs=logprobs)] if logprobs else []
        if not delta.finish:
            return found
        text, calls = self._parsed(self._held.pop(delta.index))
        if text:
            found.append(self._part(delta.index, {"content": text}))
        if calls:
            numbered = [{"index": number, **call.model_dump()} for number, call in enumerate(calls)]
            found.append(self._part(delta.index, {"tool_calls": numbered}))
        finish = "tool_calls" if calls and delta.finish == "stop" else delta.finish
        return [*found, self._part(delta.index, {}, finish=finish)]

    def _part(self, index: int, delta: Json, *, logprobs: Json | None = None, finish: str | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


class TextFormat:
    """Objects of /v1/completions."""

    def __init__(self, head: ResponseHead, *, with_logprobs: bool) -> None:
        self._head = head
        self.response_id = head.id
        self._with_logprobs = with_logprobs
        self._lengths: dict[int, int] = {}

    def whole(self, choices: Sequence[_Choice], usage: Usage) -> Completion:
        shown = [
            TextChoice(
                index=index,
                text=choice.text,
                logprobs=TextLogprobs(**text_logprobs(choice.logprobs, start=0)) if self._with_logprobs else None,
                finish_reason=choice.finish,  # pyright: ignore[reportArgumentType]
            )
            for index, choice in enumerate(choices)
        ]
        return Completion(
            id=self._head.id,
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.system_fingerprint,
            choices=shown,
            usage=usage,
        )

    def chunk(self, choices: list[Json]) -> Json:
        return {
            "id": self._head.id,
            "object": "text_completion",
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.system_fingerprint,
            "choices": choices,
        }

    def opening(self, n: int) -> list[Json]:
        """Return the parts before the first token."""
        return []

    def parts(self, delta: Delta) -> list[Json]:
        start = self._lengths.get(delta.index, 0)
        self._lengths[delta.index] = start + sum(len(token["token"]) for token in delta.logprobs)
        logprobs = None
        if self._with_logprobs and delta.logprobs:
            logprobs = text_logprobs(delta.logprobs, start=start)
        return [{"index": delta.index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish}]
