"""Rows that are not chats, in OpenAI's examples too: accepted and rejected ones. A file holds rows of one kind."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from catalog.datasets.chat import Chat, check_chat, is_supervised
from catalog.datasets.formats import KIND_NAMES, KINDS, RowKind
from catalog.datasets.row_json import parse_object
from catalog.datasets.rows import as_chat, check_completion, check_pair
from catalog.datasets.validator import DatasetCheck, inspect
from catalog.errors import InvalidRequest

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SAMPLES: dict[str, dict[str, Any]] = {
    "chat": {"messages": [USER, ANSWER]},
    "completion": {"prompt": "2 + 2 =", "completion": " 4"},
    "text": {"text": "Once upon a time."},
    "preference": {
        "input": {"messages": [USER]},
        "preferred_output": [ANSWER],
        "non_preferred_output": [{"role": "assistant", "content": "go away"}],
    },
    "unpaired": {"prompt": "2 + 2 =", "completion": " 5", "label": False},
}


def check(*rows: Any) -> DatasetCheck:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return inspect(io.BytesIO(content), max_line_bytes=10_000, max_rows=10)


def refusal(*rows: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check(*rows)
    assert caught.value.remedy.endswith(".")
    return caught.value


def test_every_kind_has_a_sample() -> None:
    assert set(SAMPLES) == {kind.name for kind in KINDS}


@pytest.mark.parametrize("kind", SAMPLES)
def test_file_has_the_kind_of_its_rows(kind: str) -> None:
    found = check(SAMPLES[kind], SAMPLES[kind])

    assert (found.num_rows, found.kind) == (2, kind)


@pytest.mark.parametrize("first", SAMPLES)
@pytest.mark.parametrize("second", SAMPLES)
def test_kinds_cannot_be_mixed(first: str, second: str) -> None:
    if first == second:
        return
    problem = refusal(SAMPLES[first], SAMPLES[second])

    assert problem.code == "invalid_row"
    if (first, second) == ("unpaired", "completion"):
        return
    assert problem.message.startswith("Line 2: the row is ")
    assert ", but the row on line 1 is " in problem.message


def test_row_of_another_kind_is_compared_with_the_first_row_that_has_a_kind() -> None:
    problem = refusal({}, SAMPLES["chat"], SAMPLES["text"])

    assert "Line 3: the row is plain text, but the row on line 2 is a chat." in problem.message


def test_row_without_a_known_format_is_reported_with_its_keys() -> None:
    assert "format: its only key is 'label'." in refusal({"label": True}).message
    assert "format: its keys are 'question', 'answer'." in refusal({"question": 1, "answer": 2}).message
    assert "'k0', 'k1', 'k2', 'k3', 'k4' and 2 more." in refusal({f"k{number}": 1 for number in range(7)}).message


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_row_without_a_known_format_is_reported_with_each_format(kind: RowKind) -> None:
    rows: list[dict[str, Any]] = [{}, {"question": 1}]
    for row in rows:
        assert kind.form in refusal(row).remedy


def test_empty_messages_are_reported_with_the_messages_to_use() -> None:
    assert '"user"' in refusal({"prompt": [], "completion": [ANSWER]}).remedy
    assert '"assistant"' in refusal({"prompt": [USER], "completion": []}).remedy
    for output in ("x", []):
        assert '"assistant"' in refusal({**PAIR, "preferred_output": output}).remedy


PAIR: dict[str, Any] = {
    "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [ANSWER],
    "non_preferred_output": [{"role": "assistant", "content": "go away"}],
}
LABELED: dict[str, Any] = {"prompt": "2 + 2 =", "completion": " 4", "label": True}
LABELED_TURNS: dict[str, Any] = {"prompt": [USER], "completion": [ANSWER], "label": False}
INVALID_ROWS: list[Any] = [
    {},
    {"txt": "a"},
    {"prompt": "a"},
    {"completion": "a"},
    {"prompt": "a", "completion": "b", "id": 1},
    {"prompt": "a", "completion": "b", "tools": []},
    {"prompt": None, "completion": "b"},
    {"prompt": "a", "completion": 4},
    {"prompt": "a", "completion": " \n"},
    {"prompt": "a", "completion": [ANSWER]},
    {"prompt": [], "completion": [ANSWER]},
    {"prompt": [USER], "completion": []},
    {"prompt": [USER], "completion": [USER]},
    {"prompt": [{"role": "bot", "content": "x"}], "completion": [ANSWER]},
    {"text": "a", "meta": 1},
    {"text": ["a"]},
    {"text": "  "},
    *({name: value for name, value in PAIR.items() if name != left_out} for left_out in PAIR),
    {**PAIR, "weight": 1},
    {**PAIR, "input": []},
    {**PAIR, "input": {}},
    {**PAIR, "input": {"messages": []}},
    {**PAIR, "input": {"messages": [ANSWER]}},
    {**PAIR, "input": {**PAIR["input"], "tools": [{"type": "function"}]}},
    {**PAIR, "input": {**PAIR["input"], "parallel_tool_calls": 1}},
    {**PAIR, "preferred_output": "x"},
    {**PAIR, "preferred_output": [ANSWER, ANSWER]},
    {**PAIR, "non_preferred_output": [{"role": "user", "content": "x"}]},
    {**PAIR, "non_preferred_output": [{"role": "assistant", "content": " "}]},
    {**PAIR, "preferred_output": [{**ANSWER, "weight": 1}]},
    {**PAIR, "preferred_output": [{"role": "assistant", "content": None}]},
    {**PAIR, "preferred_output": PAIR["non_preferred_output"]},
    {"prompt": "a", "label": True},
    {**LABELED, "label": 1},
    {**LABELED, "label": "true"},
    {**LABELED, "label": None},
    {**LABELED, "score": 3},
    {**LABELED, "completion": " "},
    {**LABELED_TURNS, "completion": "five"},
    {**LABELED_TURNS, "completion": [ANSWER, ANSWER]},
    {**LABELED_TURNS, "prompt": [USER, ANSWER]},
    {**LABELED_TURNS, "completion": [{**ANSWER, "weight": 1}]},
]


@pytest.mark.parametrize("row", INVALID_ROWS, ids=str)
def test_invalid_row_is_rejected_with_its_line(row: dict[str, Any]) -> None:
    problem = refusal(row)

    assert problem.code == "invalid_row"
    assert problem.message.startswith("Line 1: ")


@pytest.mark.parametrize("row", [PAIR, LABELED, LABELED_TURNS])
def test_pairs_and_labeled_answers_are_accepted(row: dict[str, Any]) -> None:
    assert check(row, row).num_rows == 2


def test_prompt_may_be_empty() -> None:
    assert check({"prompt": "", "completion": "b"}).kind == "completion"


def test_only_answers_in_the_completion_are_trained_on() -> None:
    row = check_completion({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})

    assert as_chat(row).messages == [USER, {**ANSWER, "weight": 0}, USER, ANSWER]


def test_file_with_only_masked_completions_is_rejected() -> None:
    masked = {"prompt": [USER], "completion": [{**ANSWER, "weight": 0}]}

    assert refusal(masked).code == "nothing_to_learn"
    assert check(masked, {"prompt": [USER], "completion": [ANSWER]}).num_rows == 2


@pytest.mark.parametrize(
    ("row", "form", "named"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "TRL", ("preferred_output", "input")),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "TRL", ("both begin",)),
        ({"instruction": "a", "input": "", "output": "b"}, "Alpaca", ('"prompt"', '"completion"')),
        ({"instruction": "a", "output": "b"}, "Alpaca", ('"prompt"', '"completion"')),
        ({"conversations": [{"from": "human", "value": "a"}]}, "ShareGPT", ('"messages"', "role")),
    ],
    ids=str,
)
def test_rows_in_foreign_formats_are_named_with_a_remedy(
    row: dict[str, Any], form: str, named: tuple[str, ...]
) -> None:
    problem = refusal(row)

    assert problem.code == "invalid_row"
    assert form in problem.message
    assert all(name in problem.remedy for name in named)


FOLDER = Path(__file__).parent / "openai_rows"


def chats(name: str) -> list[Chat]:
    return [check_chat(parse_object(line)) for line in (FOLDER / name).read_bytes().splitlines()]


@pytest.mark.parametrize(
    ("name", "kind", "num_rows"),
    [("chat.jsonl", "chat", 3), ("tool_calls.jsonl", "chat", 2), ("preference.jsonl", "preference", 2)],
)
def test_file_is_accepted(name: str, kind: str, num_rows: int) -> None:
    with (FOLDER / name).open("rb") as file:
        check = inspect(file, max_line_bytes=2**20, max_rows=100)

    assert (check.kind, check.num_rows) == (kind, num_rows)


def test_weights_of_a_chat_are_read() -> None:
    plain, short, weighted = chats("chat.jsonl")

    assert [message["role"] for message in plain.messages] == ["system", "user", "assistant"]
    assert [message["role"] for message in short.messages] == ["user", "assistant"]
    assert [message.get("weight") for message in weighted.messages] == [None, None, 0, None, 1]
    assert all(is_supervised(chat) for chat in (plain, short, weighted))


def test_single_and_parallel_tool_calls_are_read() -> None:
    single, parallel = chats("tool_calls.jsonl")

    def called(chat: Chat) -> list[tuple[str, object]]:
        calls = chat.messages[1].get("tool_calls", [])
        return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]

    weather = {"location": "Lima, Peru", "format": "celsius"}
    assert called(single) == [("get_current_weather", {"location": "Oslo, Norway", "format": "celsius"})]
    assert called(parallel) == [("get_current_weather", weather), ("get_time", {"location": "Lima, Peru"})]
    assert [len(chat.tools or ()) for chat in (single, parallel)] == [1, 2]
    assert [message["role"] for message in parallel.messages[2:]] == ["tool", "tool", "assistant"]


def test_preference_pairs_of_texts_and_tool_calls_are_read() -> None:
    text, calls = (check_pair(parse_object(line)) for line in (FOLDER / "preference.jsonl").read_bytes().splitlines())

    assert text["preferred"]["content"].startswith("In Oslo")
    assert text["rejected"]["content"] == "It is winter there."
    assert not text["prompt"].tools
    assert len(calls["prompt"].tools or ()) == 1
    (call,) = calls["preferred"].get("tool_calls", [])
    assert call["function"]["arguments"] == {"location": "Rome, Italy", "format": "celsius"}
    assert "tool_calls" not in calls["rejected"]
