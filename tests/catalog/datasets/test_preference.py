"""Preference pairs: accepted rows, and the errors of rejected ones."""

import io
import json
from typing import Any

import pytest

from catalog.datasets.validator import inspect
from catalog.errors import InvalidRequest

GOOD: dict[str, Any] = {
    "input": {"messages": [{"role": "user", "content": "How cold is it?"}], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [{"role": "assistant", "content": "Ten degrees."}],
    "non_preferred_output": [{"role": "assistant", "content": "Quite."}],
}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def lines(*rows: Any) -> io.BytesIO:
    return io.BytesIO(b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def refusal(*rows: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        inspect(lines(*rows), max_line_bytes=2**20, max_rows=100)
    assert caught.value.remedy.endswith(".")
    return caught.value


def test_openai_preference_format_is_accepted() -> None:
    check = inspect(lines(GOOD, GOOD), max_line_bytes=2**20, max_rows=100)

    assert (check.num_rows, check.kind) == (2, "preference")


ANSWER = {"role": "assistant", "content": "x"}
WRONG = {
    "unknown_key": {"weight": 1},
    "input_not_object": {"input": []},
    "messages_missing": {"input": {}},
    "messages_empty": {"input": {"messages": []}},
    "prompt_ends_with_answer": {"input": {"messages": [ANSWER]}},
    "invalid_tools": {"input": {**GOOD["input"], "tools": [{"type": "function"}]}},
    "invalid_parallel_tool_calls": {"input": {**GOOD["input"], "parallel_tool_calls": 1}},
    "messages_not_list": {"preferred_output": "x"},
    "several_answers": {"preferred_output": [ANSWER, ANSWER]},
    "answer_not_assistant": {"non_preferred_output": [{"role": "user", "content": "x"}]},
    "answer_empty": {"non_preferred_output": [{"role": "assistant", "content": " "}]},
    "invalid_weight": {"preferred_output": [{**ANSWER, "weight": 1}]},
    "content_not_text": {"preferred_output": [{"role": "assistant", "content": None}]},
    "equal_outputs": {"preferred_output": GOOD["non_preferred_output"]},
}


@pytest.mark.parametrize(("code", "change"), WRONG.items(), ids=WRONG)
def test_invalid_pair_is_reported_with_its_line(code: str, change: dict[str, Any]) -> None:
    problem = refusal(GOOD, {**GOOD, **change})

    assert problem.code == code
    assert problem.message.startswith("Line 2: ")


@pytest.mark.parametrize("output", ["x", []])
def test_output_without_messages_is_reported_with_the_answer_to_use(output: Any) -> None:
    assert '"assistant"' in refusal({**GOOD, "preferred_output": output}).remedy


@pytest.mark.parametrize("key", GOOD)
def test_missing_part_of_a_pair_is_rejected(key: str) -> None:
    lacking = {name: value for name, value in GOOD.items() if name != key}

    assert refusal(lacking).code == f"{key}_missing"


@pytest.mark.parametrize("rows", [(GOOD, CHAT), (CHAT, GOOD)])
def test_chats_and_pairs_cannot_be_mixed(rows: tuple[Any, Any]) -> None:
    problem = refusal(*rows)

    assert problem.code == "mixed_kinds"
    assert problem.message.startswith("Line 2: ")
