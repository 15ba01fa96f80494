"""Errors of rows that must name the place, the cause and a fix that works."""

import io
import json
from typing import Any

import pytest

from catalog.datasets import validator
from catalog.errors import InvalidRequest

USER = {"role": "user", "content": "Question"}
ANSWER = {"role": "assistant", "content": "Answer"}
FUNCTION = {"role": "function", "name": "f", "content": "1"}
ARGUMENTS = "messages[1].tool_calls[0].function.arguments"


def refusal(*rows: dict[str, Any] | bytes) -> InvalidRequest:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    with pytest.raises(InvalidRequest) as refused:
        validator.inspect(io.BytesIO(b"\n".join(lines)), max_line_bytes=10_000, max_rows=10)
    return refused.value


def calling(**function: Any) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", **({"function": function} if function else {})}
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ('{"a": 1, "a": 2}', "invalid_row", "the key 'a' appears more than once in the same object"),
        ('{"a": NaN}', "invalid_row", "NaN is not valid JSON"),
        ('{"a": "\\ud800"}', "invalid_row", "\\ud800 is half of a surrogate pair"),
    ],
)
def test_an_error_in_the_arguments_of_a_call_names_them(arguments: str, code: str, reason: str) -> None:
    problem = refusal(calling(name="f", arguments=arguments))

    assert problem.code == code
    assert problem.message == f"Line 1: in {ARGUMENTS}, {reason}."


def test_a_missing_function_is_not_called_null() -> None:
    assert refusal(calling()).message == "Line 1: messages[1].tool_calls[0].function is missing."
    tools = [{"type": "function"}]
    assert refusal({"messages": [USER, ANSWER], "tools": tools}).message == "Line 1: tools[0].function is missing."


def test_an_invalid_function_name_is_called_invalid() -> None:
    problem = refusal(calling(name="get weather", arguments="{}"))

    assert problem.message.endswith("function.name is 'get weather', which is not a valid name.")


def test_a_key_of_a_tool_in_the_wrong_place_may_be_moved() -> None:
    problem = refusal({"messages": [USER, ANSWER], "tools": [{"type": "function", "name": "f"}]})

    assert problem.message == "Line 1: tools[0] has an unknown key, 'name'."
    assert problem.remedy.startswith("Remove the key, or correct its spelling or position.")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a', "the JSON is invalid at column 10: unterminated string"),
        (b'{"text": "\\uZZZZ"}', "the JSON is invalid at column 12: invalid \\uXXXX escape"),
        (b'{"text": "\t"}', "the JSON is invalid at column 11: invalid control character"),
    ],
)
def test_the_reason_for_invalid_json_is_a_whole_phrase(line: bytes, reason: str) -> None:
    assert refusal(line).message == f"Line 1: {reason}."


def test_tools_with_a_prompt_as_text_are_not_called_unknown() -> None:
    problem = refusal({"prompt": "a", "completion": "b", "tools": []})

    assert problem.code == "invalid_row"
    assert problem.message == (
        "Line 1: 'tools' is allowed only with lists of messages, but prompt and completion are strings."
    )


def test_tools_beside_the_input_of_a_pair_are_to_be_moved_into_it() -> None:
    pair = {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}

    assert refusal({**pair, "tools": []}).remedy == "Move 'tools' into 'input', next to 'messages'."


def test_a_missing_key_of_a_labeled_answer_keeps_the_label_in_the_fix() -> None:
    problem = refusal({"completion": "b", "label": True})

    assert problem.code == "invalid_row"
    assert problem.remedy == 'Use {"prompt": ..., "completion": ..., "label": true}.'


def test_the_result_of_a_function_needs_its_call_in_the_same_list() -> None:
    call = {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}
    problem = refusal({"prompt": [USER, call], "completion": [FUNCTION, ANSWER]})

    assert problem.message == (
        "Line 1: completion[0].role is 'function', but no earlier message in 'completion' has a function call."
    )


def test_completions_without_tokens_to_train_on_are_named() -> None:
    problem = refusal({"prompt": [USER, ANSWER, USER], "completion": [{**ANSWER, "weight": 0}]})

    assert problem.message == (
        "Every assistant message with text or tool calls in a completion has weight 0, so the file has no tokens to "
        "train on."
    )
