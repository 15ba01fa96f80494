"""Requests are validated before a worker gets them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError

from api.inference.batch_input import lines_of, parse
from api.inference.calls import chat_call, text_call
from api.schemas.inference import ChatCompletionRequest, CompletionRequest, SamplingRequest, StreamOptions
from catalog.errors import InvalidRequest


def test_number_of_answers_to_all_prompts_is_limited() -> None:
    assert text_call(CompletionRequest(model="smol", prompt=["a"] * 16, n=4)).num_choices == 64

    with pytest.raises(InvalidRequest, match="80 answers: n is 5, and there are 16 prompts") as raised:
        text_call(CompletionRequest(model="smol", prompt=["a"] * 16, n=5))

    assert (raised.value.code, raised.value.param) == ("conflicting_value", "n")


def test_null_is_the_default_of_each_sampling_parameter() -> None:
    names = ("temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty", "stream")
    question = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}]}

    without = chat_call(ChatCompletionRequest.model_validate(question))
    given = chat_call(ChatCompletionRequest.model_validate({**question, **dict.fromkeys(names)}))

    assert {**given.parameters, "seed": 0} == {**without.parameters, "seed": 0}
    assert [given.parameters[name] for name in ("temperature", "top_p", "n")] == [1.0, 1.0, 1]
    assert given.num_choices == 1


HALF = "\ud83d"
"""Half of an emoji, as a client sends it that cuts text between UTF-16 code units."""
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"minimum": 0.0, "maximum": 3}}}
QUESTION: dict[str, Any] = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": f"a{HALF}"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "name": HALF}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {HALF: 1}}}]}, "tools"),
    ],
)
def test_half_a_character_in_a_conversation_is_an_error_of_the_client(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"In '{param}', \\ud83d is half of a surrogate pair\.") as raised:
        chat_call(ChatCompletionRequest.model_validate({**QUESTION, **fields}))

    assert (raised.value.code, raised.value.param) == ("invalid_row", param)


def test_half_a_character_in_a_prompt_is_an_error_of_the_client() -> None:
    with pytest.raises(InvalidRequest, match="half of a surrogate pair") as raised:
        text_call(CompletionRequest(model="smol", prompt=["a", HALF]))

    assert (raised.value.code, raised.value.param) == ("invalid_row", "prompt")


def test_whole_characters_outside_the_basic_plane_are_kept() -> None:
    call = chat_call(
        ChatCompletionRequest.model_validate({**QUESTION, "messages": [{"role": "user", "content": "😀"}]})
    )

    assert call.parameters["messages"] == [{"role": "user", "content": "😀"}]


def test_numbers_in_tools_are_kept_as_they_were_sent() -> None:
    """A template renders 0.0 and 0 differently, and data files keep both."""
    single = chat_call(ChatCompletionRequest.model_validate({**QUESTION, "tools": [TOOL], "top_p": 1.0, "n": 2.0}))
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {**QUESTION, "tools": [TOOL]}}
    batched = parse(json.dumps(line).encode(), endpoint="/v1/chat/completions", max_line_bytes=10_000).call

    for call in (single, batched):
        assert json.dumps(call.parameters["tools"]) == json.dumps([TOOL])
    assert single.num_choices == 2


@pytest.mark.parametrize(
    ("schema", "least", "params"),
    [
        (ChatCompletionRequest, QUESTION, chat_params.CompletionCreateParamsBase),
        (CompletionRequest, {"model": "smol", "prompt": "Hi"}, text_params.CompletionCreateParamsBase),
    ],
)
def test_null_is_accepted_for_each_optional_parameter_of_the_client(
    schema: type[SamplingRequest], least: dict[str, Any], params: Any
) -> None:
    names = set(params.__annotations__) - least.keys()

    accepted = schema.model_validate({**least, **dict.fromkeys(names)})
    within = schema.model_validate({**least, "stream_options": {"include_usage": None, "include_obfuscation": None}})

    assert accepted == schema.model_validate(least)
    assert within.stream_options == StreamOptions()
    assert schema.unsupported == names - schema.model_fields.keys()
    for name in schema.unsupported:
        with pytest.raises(ValidationError):
            schema.model_validate({**least, name: {}})


@pytest.mark.parametrize("name", ["temprature", "suffix", "extra_body"])
def test_null_of_an_unknown_parameter_is_rejected(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        ChatCompletionRequest.model_validate({**QUESTION, name: None})


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 1000])
def test_byte_order_mark_of_a_batch_file_is_skipped(chunk_bytes: int) -> None:
    content = b"\xef\xbb\xbf" + b"a" * 10 + b"\n\xef\xbb\xbfb\n"
    chunks = [content[start : start + chunk_bytes] for start in range(0, len(content), chunk_bytes)]

    lines = list(lines_of(chunks, max_line_bytes=10))

    assert lines == [(1, b"a" * 10), (2, b"\xef\xbb\xbfb")]
    assert list(lines_of([b"\xef\xbb\xbf" + b"a" * 12], max_line_bytes=10)) == [(1, b"a" * 11)]
    assert list(lines_of([b"\xef\xbb"], max_line_bytes=10)) == [(1, b"\xef\xbb")]
    assert list(lines_of([], max_line_bytes=10)) == []


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [65, 5000])
def test_tools_that_are_nested_too_deeply_are_errors_of_the_client(depth: int) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"a": nested(depth)}}}
    with pytest.raises(InvalidRequest) as raised:
        chat_call(ChatCompletionRequest.model_validate({**QUESTION, "tools": [tool]}))
    assert (raised.value.code, raised.value.param) == ("invalid_row", "tools")


@pytest.mark.parametrize(("depth", "is_accepted"), [(64, True), (65, False), (950, False), (100_000, False)])
def test_lines_with_more_than_64_levels_are_rejected(depth: int, is_accepted: bool) -> None:
    given = depth - 6  # the levels around the value
    value = b"[" * given + b"]" * given
    tool = b'{"type": "function", "function": {"name": "f", "parameters": {"a": %s}}}' % value
    body = b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": [%s]}' % tool
    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": %s}' % body

    if is_accepted:
        assert parse(line, endpoint="/v1/chat/completions", max_line_bytes=2**23).custom_id == "a"
        return
    with pytest.raises(InvalidRequest, match="more than 64 levels") as raised:
        parse(line, endpoint="/v1/chat/completions", max_line_bytes=2**23)
    assert raised.value.code == "invalid_row"


def test_error_of_a_line_does_not_repeat_a_long_name() -> None:
    name = "a.b" * 2_000_000
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {}, name: 1}

    with pytest.raises(InvalidRequest) as raised:
        parse(json.dumps(line).encode(), endpoint="/v1/chat/completions", max_line_bytes=2**23)

    assert raised.value.param == name[:200]
    assert len(raised.value.sentence()) < 3000


def test_all_problems_of_a_line_are_counted() -> None:
    row = {f"key {number}": 0 for number in range(100_000)}

    with pytest.raises(InvalidRequest, match="99999 more problems were found") as raised:
        parse(json.dumps(row).encode(), endpoint="/v1/chat/completions", max_line_bytes=2**23)
    assert raised.value.code == "missing_required_parameter"
