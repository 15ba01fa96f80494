"""A whole answer: its compact form of limited size, its JSON object, and its errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from api.inference.answer import AnswerInterrupted, Delta, PartialAnswer, failure
from api.inference.responses import ChatFormat, TextFormat, head_of, whole
from catalog.errors import InvalidRequest, LorryError
from catalog.inference.requests import AnswerFailed

PLAIN: dict[str, Any] = {"token": "\u00e9", "logprob": -0.25, "bytes": [195, 169]}
TOKEN = {**PLAIN, "top_logprobs": [PLAIN, {"token": "\ufffd", "logprob": -2.0, "bytes": None}]}


def collect(*deltas: Delta, is_chat: bool = True, n: int = 1) -> dict[str, Any]:
    async def given() -> AsyncGenerator[Delta]:
        for delta in deltas:
            yield delta

    if is_chat:
        head = head_of("chatcmpl", model="smol", base_digest="0" * 64)
        form: ChatFormat | TextFormat = ChatFormat(head, tools=frozenset(), with_logprobs=True)
    else:
        form = TextFormat(head_of("cmpl", model="smol", base_digest="0" * 64), with_logprobs=True)
    return json.loads(asyncio.run(whole(given(), PartialAnswer(prompt_tokens=3, completion_tokens=2), form, n=n)))


def delta(text: str, *tokens: dict[str, Any], index: int = 0, finish: str | None = None) -> Delta:
    return Delta(index=index, text=text, logprobs=list(tokens), finish=finish)


def test_log_probabilities_are_complete() -> None:
    found = collect(delta("a", TOKEN), delta("b", index=1), delta("c", TOKEN, TOKEN, finish="length"), n=2)

    first, second = found["choices"]
    assert (first["message"]["content"], first["finish_reason"]) == ("ac", "length")
    assert first["logprobs"]["content"] == [TOKEN] * 3
    assert (second["message"]["content"], second["logprobs"]["content"]) == ("b", [])
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    (text,) = collect(delta("a", TOKEN), is_chat=False)["choices"]
    assert text["logprobs"] == {
        "tokens": ["\u00e9"],
        "token_logprobs": [-0.25],
        "top_logprobs": [{"\u00e9": -0.25, "\ufffd": -2.0}],
        "text_offset": [0],
    }


@pytest.mark.parametrize(
    ("alternatives", "expected"),
    [
        ([("b", -0.5), ("c", -1.0)], {"a": -3.0, "b": -0.5, "c": -1.0}),
        ([("b", -0.5), ("a", -3.0)], {"b": -0.5, "a": -3.0}),
        ([("a", -0.5), ("a", -3.0)], {"a": -3.0}),
        ([("b", -0.5), ("b", -1.0)], {"a": -3.0, "b": -0.5}),
        ([], {"a": -3.0}),
    ],
    ids=["unlikely", "likely", "text of a more likely token", "same text", "no alternatives"],
)
def test_sampled_token_is_among_the_most_likely_ones_of_a_text(
    alternatives: list[tuple[str, float]], expected: dict[str, float]
) -> None:
    top = [{"token": text, "logprob": logprob, "bytes": None} for text, logprob in alternatives]
    token = {"token": "a", "logprob": -3.0, "bytes": [97], "top_logprobs": top}

    (choice,) = collect(delta("a", token), is_chat=False)["choices"]

    assert choice["logprobs"]["top_logprobs"] == [expected]


def test_size_of_the_log_probabilities_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    num_bytes = len(json.dumps(TOKEN, separators=(",", ":"))) + 1
    monkeypatch.setattr("api.inference.answer.MAX_KEPT_BYTES", 3 * num_bytes)
    collect(*[delta("", TOKEN)] * 3)

    with pytest.raises(InvalidRequest, match="was stopped") as raised:
        collect(*[delta("", TOKEN)] * 4)

    assert (raised.value.code, raised.value.param) == ("answer_too_large", "logprobs")
    assert "set stream to true" in raised.value.remedy


@pytest.mark.parametrize(
    ("code", "kind", "param"),
    [
        ("context_length_exceeded", InvalidRequest, "prompt"),
        ("template_without_tools", InvalidRequest, "tools"),
        ("out_of_memory", AnswerInterrupted, None),
        ("disk_error", AnswerInterrupted, None),
        ("inference_failed", AnswerFailed, None),
    ],
)
def test_error_of_a_worker_becomes_one_of_the_api(code: str, kind: type[LorryError], param: str | None) -> None:
    error = failure({"code": code, "message": "It is wrong.", "remedy": "Do better."}, prompt="prompt")

    assert type(error) is kind
    assert (error.code, error.param, error.sentence()) == (code, param, "It is wrong. Do better.")


def test_text_that_is_kept_until_the_answer_is_complete_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.inference.answer.MAX_KEPT_BYTES", 10)
    answer = PartialAnswer()
    answer.keep(5)
    answer.keep(5)

    with pytest.raises(InvalidRequest) as raised:
        answer.keep(1)

    assert (raised.value.code, raised.value.param) == ("answer_too_large", "max_tokens")
