"""Tools and tool calls in rows: OpenAI's examples are accepted, and each error names its place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from catalog.datasets.chat import check_chat, is_supervised
from catalog.datasets.messages import ChatMessage, check_messages
from catalog.datasets.row_json import BadRow, parse_object
from catalog.datasets.rows import as_chat, check_completion, check_pair, check_unpaired, conversation_of
from catalog.datasets.tools import ToolCall, check_tool_calls

FUNCTION = {
    "name": "get_current_weather",
    "description": "Get the current weather",
    "parameters": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city and country, eg. San Francisco, USA"},
            "format": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["location", "format"],
    },
}
TOOL = {"type": "function", "function": FUNCTION}
ARGUMENTS = {"location": "San Francisco, USA", "format": "celsius"}
CALL = {
    "id": "call_id",
    "type": "function",
    "function": {"name": "get_current_weather", "arguments": json.dumps(ARGUMENTS)},
}
USER = {"role": "user", "content": "What is the weather in San Francisco?"}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_id", "content": "21.0"}
ANSWER = {"role": "assistant", "content": "It is 21 degrees celsius."}


def parsed(row: Any) -> dict[str, Any]:
    return parse_object(json.dumps(row).encode())


def refusal(row: Any) -> BadRow:
    with pytest.raises(BadRow) as caught:
        check_chat(parsed(row))
    return caught.value


def calls_of(message: ChatMessage) -> list[ToolCall]:
    return message.get("tool_calls", [])


def test_openais_example_of_tool_calls_is_accepted() -> None:
    chat = check_chat(parsed({"messages": [USER, CALLING], "parallel_tool_calls": False, "tools": [TOOL]}))

    assert chat.tools == [TOOL]
    assert chat.messages[1]["content"] == ""
    (call,) = calls_of(chat.messages[1])
    assert call == {
        "id": "call_id",
        "type": "function",
        "function": {"name": "get_current_weather", "arguments": ARGUMENTS},
    }
    assert is_supervised(chat)


def test_openais_deprecated_functions_are_read_as_tools() -> None:
    messages = [
        USER,
        {"role": "assistant", "function_call": {"name": "get_current_weather", "arguments": json.dumps(ARGUMENTS)}},
        {"role": "function", "name": "get_current_weather", "content": "21.0"},
        ANSWER,
    ]

    chat = check_chat(parsed({"messages": messages, "functions": [FUNCTION]}))

    assert chat.tools == [TOOL]
    (call,) = calls_of(chat.messages[1])
    assert call["function"]["arguments"] == ARGUMENTS
    assert chat.messages[2] == {
        "role": "tool",
        "name": "get_current_weather",
        "content": "21.0",
        "tool_call_id": call["id"],
    }


def test_message_saved_from_a_response_is_accepted_with_its_null_fields() -> None:
    saved = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "audio": None,
        "function_call": None,
        "annotations": [],
    }

    chat = check_chat(parsed({"messages": [USER, {**saved, "tool_calls": [CALL]}, RESULT, ANSWER]}))

    assert set(chat.messages[1]) == {"role", "content", "tool_calls"}
    assert chat.tools is None


def test_tool_calls_with_weight_0_are_not_trained_on() -> None:
    masked = check_chat(parsed({"messages": [USER, {**CALLING, "weight": 0}], "tools": [TOOL]}))

    assert not is_supervised(masked)


def test_pair_may_compare_tool_calls() -> None:
    other = {**CALL, "function": {"name": "get_current_weather", "arguments": "{}"}}
    row = {
        "input": {"messages": [USER], "tools": [TOOL], "parallel_tool_calls": True},
        "preferred_output": [CALLING],
        "non_preferred_output": [{"role": "assistant", "tool_calls": [other]}],
    }

    pair = check_pair(parsed(row))

    assert pair["prompt"].tools == [TOOL]
    assert calls_of(pair["preferred"]) != calls_of(pair["rejected"])
    with pytest.raises(BadRow, match="identical"):
        check_pair(parsed({**row, "non_preferred_output": [CALLING]}))


def test_completions_and_labeled_answers_of_messages_may_have_tools() -> None:
    row = {"prompt": [USER], "completion": [CALLING], "tools": [TOOL]}

    assert as_chat(check_completion(parsed(row))).tools == [TOOL]
    labeled = conversation_of(check_unpaired(parsed({**row, "label": True}))["answer"])
    assert labeled is not None
    assert labeled.tools == [TOOL]


def with_call(**changed: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, **changed}]}]}


def with_function(**changed: Any) -> dict[str, Any]:
    return with_call(function={**CALL["function"], **changed})  # pyright: ignore[reportGeneralTypeIssues]


def with_tool(**changed: Any) -> dict[str, Any]:
    return {"messages": [USER, ANSWER], "tools": [{**TOOL, **changed}]}


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"messages": [USER, ANSWER], "tools": {}}, "tools is an object, not a list"),
        ({"messages": [USER, ANSWER], "tools": [3]}, "tools[0] is a number, not an object"),
        ({"messages": [USER, ANSWER], "tools": [TOOL, TOOL]}, "'get_current_weather' more than once"),
        ({"messages": [USER, ANSWER], "tools": [TOOL] * 129}, "has 129 tools, but the maximum is 128"),
        ({"messages": [USER, ANSWER], "tools": [TOOL], "functions": [FUNCTION]}, "are both set"),
        ({"messages": [USER, ANSWER], "functions": "f"}, "functions is a string, not a list"),
        (with_tool(type="retrieval"), "tools[0].type is 'retrieval', not 'function'"),
        (with_tool(function={}), "tools[0].function.name is missing"),
        (with_tool(function={"name": "a b"}), "tools[0].function.name is 'a b'"),
        (with_tool(function={"name": "a", "parameters": []}), "parameters is a list, not an object"),
        (with_tool(function={"name": "a", "description": 1}), "description is a number, not a string"),
        (with_tool(function={"name": "a", "strict": 1}), "strict is a number, not true or false"),
        (with_tool(function={"name": "a", "params": {}}), "unknown key, 'params'"),
        ({"messages": [USER, ANSWER], "parallel_tool_calls": 1}, "is a number"),
        (with_call(id=""), "messages[1].tool_calls[0].id is empty"),
        (with_call(id=4), "tool_calls[0].id is a number, not a string"),
        (with_call(type=None), "tool_calls[0].type is null, not a string"),
        (with_call(index=0), "tool_calls[0] has an unknown key, 'index'"),
        (with_function(arguments={}), "arguments is an object, not a string"),
        (with_function(arguments="[1]"), "arguments contains a list, not an object"),
        (with_function(arguments='{"a": 1'), "arguments is not valid JSON"),
        (with_function(arguments='{"a": NaN}'), "in messages[1].tool_calls[0].function.arguments, NaN"),
        (with_function(arguments='{"a": "\\ud800"}'), "arguments, \\ud800 is half of a surrogate pair"),
        (with_function(arguments='{"a": 1, "a": 2}'), "arguments, the key 'a'"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}]},
            "several calls with the ID 'call_id'",
        ),
        ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "the message's role is 'user'"),
        (
            {"messages": [USER, CALLING, {**RESULT, "tool_call_id": "call_2"}, ANSWER]},
            "messages[2].tool_call_id is 'call_2'",
        ),
        (
            {"messages": [USER, RESULT, ANSWER]},
            "messages[1].tool_call_id is 'call_id', but no earlier call has this ID",
        ),
        (
            {"messages": [USER, {"role": "function", "name": "f", "content": ""}, ANSWER]},
            "no earlier message in 'messages' has a function call",
        ),
        (
            {"messages": [USER, {**CALLING, "function_call": {"name": "f", "arguments": "{}"}}]},
            "has both 'tool_calls' and 'function_call'",
        ),
        ({"messages": [USER, {**ANSWER, "refusal": "No."}]}, "messages[1].refusal"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content is null"),
    ],
)
def test_invalid_tools_are_reported_with_their_place(row: Any, part: str) -> None:
    problem = refusal(row)

    assert problem.code == "invalid_row"
    assert part in problem.reason
    assert problem.remedy.endswith((".", '"'))


def test_arguments_of_a_function_without_parameters_may_be_empty() -> None:
    chat = check_chat(parsed(with_function(arguments="")))

    assert calls_of(chat.messages[1])[0]["function"]["arguments"] == {}


def test_arguments_nested_too_deeply_are_rejected() -> None:
    for depth in (65, 100_000):
        problem = refusal(with_function(arguments='{"a":' * depth + "0" + "}" * depth))
        assert problem.code == "invalid_row"
        assert "nested too deeply: it has more than 64 levels" in problem.reason


class CountedId(str):
    """A text that counts how often it is compared."""

    __slots__ = ()
    num_comparisons = 0

    def __eq__(self, other: object) -> bool:
        CountedId.num_comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_number_of_comparisons_of_ids_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountedId, "num_comparisons", 0)
    ids = [CountedId(number) for number in range(1000)]
    calls = [{**CALL, "id": each} for each in ids]
    results = [{**RESULT, "tool_call_id": CountedId(each)} for each in ids]

    check_messages("messages", [USER, {"role": "assistant", "tool_calls": calls}, *results], form="")
    with pytest.raises(BadRow, match="several calls with the ID '999'"):
        check_tool_calls("calls", [*calls, calls[-1] | {"id": CountedId(999)}])

    assert CountedId.num_comparisons < 10_000


def test_result_of_a_deprecated_call_answers_the_last_call() -> None:
    repeated = {"role": "assistant", "tool_calls": [CALL]}
    other = {"role": "assistant", "tool_calls": [{**CALL, "id": "other"}]}
    result = {"role": "function", "name": "get_current_weather", "content": "21.0"}
    chat = check_chat(parsed({"messages": [USER, repeated, other, repeated, result, ANSWER]}))

    assert chat.messages[4].get("tool_call_id") == CALL["id"]
