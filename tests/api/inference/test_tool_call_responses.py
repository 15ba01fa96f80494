"""Tool calls of an answer, whole and streamed, as the strict models of the openai client read them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from api.inference.answer import Delta, PartialAnswer
from api.inference.calls import chat_call
from api.inference.responses import ChatFormat, chunks, whole
from api.schemas.inference import ChatCompletionRequest
from catalog.inference.requests import Model

PARIS = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
ROME = '<tool_call>{"name": "time", "arguments": {"city": "Rome"}}</tool_call>'
UNPAIRED = PARIS.replace("Paris", r"\ud800")
NOT_A_NUMBER = PARIS.replace('"Paris"', "NaN")
PARSED = [("weather", {"city": "Paris"}), ("time", {"city": "Rome"})]
Calls = list[tuple[str, dict[str, str]]]
Choice = tuple[str | None, Calls, str | None]
"""Text, calls and finish reason."""


def answer_of(texts: Sequence[str], *, finish: str) -> AsyncGenerator[Delta]:
    """Return an answer that arrives in small pieces, alternately of each choice."""

    async def deltas() -> AsyncGenerator[Delta]:
        for start in range(0, max(map(len, texts)), 5):
            for index, text in enumerate(texts):
                if piece := text[start : start + 5]:
                    yield Delta(index=index, text=piece, logprobs=[], finish=None)
        for index in range(len(texts)):
            yield Delta(index=index, text="", logprobs=[], finish=finish)

    return deltas()


def form(**given: Any) -> ChatFormat:
    tools = [{"type": "function", "function": {"name": name}} for name in ("weather", "time")]
    messages = [{"role": "user", "content": "Hi"}]
    call = chat_call(
        ChatCompletionRequest.model_validate({"model": "m", "messages": messages, "tools": tools, **given})
    )
    found = call.form(
        Model(name="m", base_model="m", base_digest="0" * 64, pack_key="k", adapter=None, renders_tools=True)
    )
    assert isinstance(found, ChatFormat)
    return found


def whole_choices(texts: Sequence[str], *, finish: str, **given: Any) -> list[Choice]:
    body = asyncio.run(whole(answer_of(texts, finish=finish), PartialAnswer(), form(**given), n=len(texts)))
    found: list[Choice] = []
    for number, choice in enumerate(ChatCompletion.model_validate_json(body, strict=True).choices):
        assert choice.index == number
        calls = [call for call in choice.message.tool_calls or [] if call.type == "function"]
        assert len({call.id for call in calls}) == len(calls)
        parsed = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
        found.append((choice.message.content, parsed, choice.finish_reason))
    return found


def streamed_choices(texts: Sequence[str], *, finish: str, **given: Any) -> list[Choice]:
    async def messages() -> list[bytes]:
        answer = answer_of(texts, finish=finish)
        return [part async for part in chunks(answer, PartialAnswer(), form(**given), n=len(texts), with_usage=False)]

    content = [""] * len(texts)
    calls: list[Calls] = [[] for _ in texts]
    finishes: list[str | None] = [None] * len(texts)
    for message in asyncio.run(messages()):
        chunk = ChatCompletionChunk.model_validate_json(message.removeprefix(b"data: "), strict=True)
        (choice,) = chunk.choices
        assert finishes[choice.index] is None, "nothing follows the last chunk of a choice"
        finishes[choice.index] = choice.finish_reason
        content[choice.index] += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            assert (call.type, call.index) == ("function", len(calls[choice.index]))
            assert call.id is not None
            assert call.function is not None
            assert call.function.name is not None
            assert call.function.arguments is not None
            calls[choice.index].append((call.function.name, json.loads(call.function.arguments)))
    return [(text or None, parsed, end) for text, parsed, end in zip(content, calls, finishes, strict=True)]


@pytest.mark.parametrize("read", [whole_choices, streamed_choices])
@pytest.mark.parametrize(
    ("texts", "finish", "expected"),
    [
        ([PARIS], "stop", [(None, PARSED[:1], "tool_calls")]),
        ([f"I ask twice. {PARIS}{ROME}"], "stop", [("I ask twice.", PARSED, "tool_calls")]),
        ([PARIS, "No call."], "stop", [(None, PARSED[:1], "tool_calls"), ("No call.", [], "stop")]),
        ([ROME, PARIS], "stop", [(None, PARSED[1:], "tool_calls"), (None, PARSED[:1], "tool_calls")]),
        ([f"{PARIS}<tool_call>{{bad"], "stop", [(f"{PARIS}<tool_call>{{bad", [], "stop")]),
        ([PARIS.replace("weather", "other")], "stop", [(PARIS.replace("weather", "other"), [], "stop")]),
        ([UNPAIRED], "stop", [(UNPAIRED, [], "stop")]),
        ([NOT_A_NUMBER], "stop", [(NOT_A_NUMBER, [], "stop")]),
        ([PARIS[:30]], "length", [(PARIS[:30], [], "length")]),
        ([PARIS], "length", [(None, PARSED[:1], "length")]),
    ],
    ids=[
        "one",
        "two",
        "one of two choices",
        "each choice",
        "malformed",
        "unknown",
        "unpaired surrogate",
        "not a number",
        "cut",
        "complete at the limit",
    ],
)
def test_calls_are_parsed(
    read: Callable[..., list[Choice]], texts: list[str], finish: str, expected: list[Choice]
) -> None:
    assert read(texts, finish=finish) == expected


@pytest.mark.parametrize("read", [whole_choices, streamed_choices])
@pytest.mark.parametrize(("is_parallel", "num_calls"), [(False, 1), (True, 2), (None, 2)])
def test_answer_without_parallel_calls_has_only_its_first_call(
    read: Callable[..., list[Choice]], is_parallel: bool | None, num_calls: int
) -> None:
    (found,) = read([f"{PARIS}{ROME}"], finish="stop", parallel_tool_calls=is_parallel)

    assert found == (None, PARSED[:num_calls], "tool_calls")
