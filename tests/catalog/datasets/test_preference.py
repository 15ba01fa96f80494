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
WRONG: list[dict[str, Any]] = [
    {"weight": 1},
    {"input": []},
    {"input": {}},
    {"input": {"messages": []}},
    {"input": {"messages": [ANSWER]}},
    {"input": {**GOOD["input"], "tools": [{"type": "function"}]}},
    {"input": {**GOOD["input"], "parallel_tool_calls": 1}},
    {"preferred_output": "x"},
    {"preferred_output": [ANSWER, ANSWER]},
    {"non_preferred_output": [{"role": "user", "content": "x"}]},
    {"non_preferred_output": [{"role": "assistant", "content": " "}]},
    {"preferred_output": [{**ANSWER, "weight": 1}]},
    {"preferred_output": [{"role": "assistant", "content": None}]},
    {"preferred_output": GOOD["non_preferred_output"]},
]


@pytest.mark.parametrize("change", WRONG)
def test_invalid_pair_is_reported_with_its_line(change: dict[str, Any]) -> None:
    problem = refusal(GOOD, {**GOOD, **change})

    assert problem.code == "invalid_row"
    assert problem.message.startswith("Line 2: ")


@pytest.mark.parametrize("output", ["x", []])
def test_output_without_messages_is_reported_with_the_answer_to_use(output: Any) -> None:
    assert '"assistant"' in refusal({**GOOD, "preferred_output": output}).remedy


@pytest.mark.parametrize("key", GOOD)
def test_missing_part_of_a_pair_is_rejected(key: str) -> None:
    lacking = {name: value for name, value in GOOD.items() if name != key}

    assert key in refusal(lacking).message


@pytest.mark.parametrize("rows", [(GOOD, CHAT), (CHAT, GOOD)])
def test_chats_and_pairs_cannot_be_mixed(rows: tuple[Any, Any]) -> None:
    problem = refusal(*rows)

    assert problem.code == "invalid_row"
    assert problem.message.startswith("Line 2: ")
