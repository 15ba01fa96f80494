"""Tool calls are recognized in the formats of common models, and nothing of any other answer is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.datasets.row_json import parse_json
from catalog.inference.answer_format import ParsedCall, parse

NAMES = {"get_weather", "add"}
PARIS = ParsedCall(name="get_weather", arguments='{"city": "Paris"}')
CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
ADD = '{"name": "add", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", ""),
        (f"Let me look.\n<tool_call>{CALL}</tool_call>", "Let me look."),
        (f"<tool_call>{CALL}", ""),
        (f"[TOOL_CALLS][{CALL}]", ""),
        (f"[TOOL_CALLS] {CALL}", ""),
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}', ""),
        (f"<|python_tag|>{CALL}", ""),
        ('{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}', ""),
    ],
)
def test_call_is_parsed(text: str, content: str) -> None:
    assert parse(text, names=NAMES) == (content, [PARIS])


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>{CALL}</tool_call>\n<tool_call>{ADD}</tool_call>",
        f"[TOOL_CALLS][{CALL}, {ADD}]",
        f"<|python_tag|>{CALL};{ADD}",
        f"[{CALL}, {ADD}]",
    ],
)
def test_several_calls_are_parsed_in_order(text: str) -> None:
    assert parse(text, names=NAMES) == ("", [PARIS, ParsedCall(name="add", arguments='{"a": 1}')])


@pytest.mark.parametrize(
    "text",
    [
        "The weather is fine.",
        "",
        '{"city": "Paris"}',
        "[1, 2]",
        '{"name": "unknown", "arguments": {}}',
        '{"name": "add", "arguments": [1]}',
        '{"name": 3, "arguments": {}}',
        "<tool_call>not JSON</tool_call>",
        f"<tool_call>{CALL}</tool_call><tool_call>broken</tool_call>",
        '{"name": "add", "arguments": "not JSON"}',
        "[TOOL_CALLS]",
        "{" * 5000,
        *(
            f'<tool_call>{{"name": "add", "arguments": {arguments}}}</tool_call>'
            for arguments in (
                r'{"a": "\ud800"}',
                r'{"\uDFFF": 1}',
                r'"{\"a\": \"\\ud800\"}"',
                '{"a": NaN}',
                '"{\\"a\\": NaN}"',
                '{"a": -Infinity}',
                '{"a": 1e999}',
                '{"a": 1, "a": 2}',
                '{"a": ' + "[" * 63 + "]" * 63 + "}",
                '{"a": ' + "[" * 5000 + "]" * 5000 + "}",
            )
        ),
    ],
)
def test_answer_without_a_valid_call_is_unchanged(text: str) -> None:
    assert parse(text, names=NAMES) == (text, [])


def test_semicolons_in_arguments_do_not_split_a_call() -> None:
    text = '{"name": "add", "arguments": {"text": "a;b"}}'

    assert parse(text, names=NAMES) == ("", [ParsedCall(name="add", arguments='{"text": "a;b"}')])


@given(st.text(alphabet='<tool_cal>/{}[]"name:arguments,;TOOL_CALLS| \n', max_size=80))
def test_any_text_is_parsed_without_an_error(text: str) -> None:
    content, calls = parse(text, names=NAMES)

    assert calls or content == text
    for call in calls:
        assert isinstance(parse_json(call.arguments), dict)


def test_many_blanks_in_a_call_do_not_delay_the_parser() -> None:
    text = "<tool_call>x" + " " * 500_000 + "y"

    assert parse(text, names=NAMES) == (text, [])
