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


def refusal(*rows: dict[str, Any] | bytes) -> InvalidRequest:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    with pytest.raises(InvalidRequest) as refused:
        validator.inspect(io.BytesIO(b"\n".join(lines)), max_line_bytes=10_000, max_rows=10)
    return refused.value


def with_tools(*tools: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [USER, ANSWER], "tools": list(tools)}


def calling(**function: Any) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", **({"function": function} if function else {})}
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}


PAIR = {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}
CALLING = {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("row", "message", "remedy"),
    [
        (calling(), "Line 1: messages[1].tool_calls[0].function is missing.", ""),
        (with_tools({"type": "function"}), "Line 1: tools[0].function is missing.", ""),
        (calling(name="a b", arguments="{}"), "function.name is 'a b', which is not a valid name.", ""),
        (with_tools({"type": "function", "name": "f"}), "has an unknown key, 'name'.", "spelling or position."),
        (b'{"text": "a', "Line 1: the JSON is invalid at column 10: unterminated string.", ""),
        (b'{"text": "\\uZZZZ"}', "Line 1: the JSON is invalid at column 12: invalid \\uXXXX escape.", ""),
        (b'{"text": "\t"}', "Line 1: the JSON is invalid at column 11: invalid control character.", ""),
        ({"prompt": "a", "completion": "b", "tools": []}, "'tools' is allowed only with lists of messages", ""),
        ({**PAIR, "tools": []}, "", "Move 'tools' into 'input', next to 'messages'."),
        ({"completion": "b", "label": True}, "", 'Use {"prompt": ..., "completion": ..., "label": true}.'),
        ({"prompt": [USER, CALLING], "completion": [FUNCTION, ANSWER]}, "no earlier message in 'completion' has", ""),
    ],
)
def test_error_names_the_place_the_cause_and_a_fix(row: dict[str, Any] | bytes, message: str, remedy: str) -> None:
    problem = refusal(row)

    assert message in problem.message
    assert remedy in problem.remedy
