"""Rows that are not chats: accepted rows, rejected rows, and the rule that a file holds rows of one kind."""

import io
import json
from typing import Any

import pytest

from catalog.datasets.formats import KIND_NAMES, KINDS, RowKind
from catalog.datasets.rows import as_chat, check_completion
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

    if (first, second) == ("unpaired", "completion"):
        assert problem.code == "invalid_row"
        return
    assert problem.code == "invalid_row"
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


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({}, "invalid_row"),
        ({"txt": "a"}, "invalid_row"),
        ({"prompt": "a"}, "invalid_row"),
        ({"completion": "a"}, "invalid_row"),
        ({"prompt": "a", "completion": "b", "id": 1}, "invalid_row"),
        ({"prompt": "a", "completion": "b", "tools": []}, "invalid_row"),
        ({"prompt": None, "completion": "b"}, "invalid_row"),
        ({"prompt": "a", "completion": 4}, "invalid_row"),
        ({"prompt": "a", "completion": " \n"}, "invalid_row"),
        ({"prompt": "a", "completion": [ANSWER]}, "invalid_row"),
        ({"prompt": [], "completion": [ANSWER]}, "invalid_row"),
        ({"prompt": [USER], "completion": []}, "invalid_row"),
        ({"prompt": [USER], "completion": [USER]}, "invalid_row"),
        ({"prompt": [{"role": "bot", "content": "x"}], "completion": [ANSWER]}, "invalid_row"),
        ({"text": "a", "meta": 1}, "invalid_row"),
        ({"text": ["a"]}, "invalid_row"),
        ({"text": "  "}, "invalid_row"),
    ],
    ids=str,
)
def test_row_errors_are_named(row: dict[str, Any], code: str) -> None:
    problem = refusal(row)

    assert problem.code == code
    assert problem.message.startswith("Line 1: ")


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
    ("row", "code", "form", "named"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "invalid_row", "TRL", ("preferred_output", "input")),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "invalid_row", "TRL", ("both begin",)),
        ({"instruction": "a", "input": "", "output": "b"}, "invalid_row", "Alpaca", ('"prompt"', '"completion"')),
        ({"instruction": "a", "output": "b"}, "invalid_row", "Alpaca", ('"prompt"', '"completion"')),
        ({"conversations": [{"from": "human", "value": "a"}]}, "invalid_row", "ShareGPT", ('"messages"', "role")),
    ],
    ids=str,
)
def test_rows_in_foreign_formats_are_named_with_a_remedy(
    row: dict[str, Any], code: str, form: str, named: tuple[str, ...]
) -> None:
    problem = refusal(row)

    assert problem.code == code
    assert form in problem.message
    assert all(name in problem.remedy for name in named)
