"""Answers with labels: what one line may hold, and what a file of them is told where it is wrong."""

import io
import json
from typing import Any

import pytest

from catalog.datasets.validator import inspect
from catalog.errors import InvalidRequest

TEXT: dict[str, Any] = {"prompt": "What is 2 + 2?", "completion": " 4", "label": True}
TURNS: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "What is 2 + 2?"}],
    "completion": [{"role": "assistant", "content": "five"}],
    "label": False,
}
SAID = {"role": "assistant", "content": "4"}


def checked(*rows: dict[str, Any]) -> tuple[int, str]:
    lines = io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())
    found = inspect(lines, max_line_bytes=10_000, max_rows=100)
    return found.num_rows, found.kind


def test_answers_with_labels_may_be_text_or_messages() -> None:
    assert checked(TEXT, {**TEXT, "label": False}) == (2, "unpaired")
    assert checked(TURNS) == (1, "unpaired")


def test_a_prompt_with_its_completion_is_another_kind() -> None:
    assert checked({"prompt": "a", "completion": "b"}) == (1, "completion")


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "a", "completion": "b"}, "label_missing"),
        ({**TEXT, "label": 1}, "label_not_boolean"),
        ({**TEXT, "label": "true"}, "label_not_boolean"),
        ({**TEXT, "label": None}, "label_not_boolean"),
        ({"prompt": "a", "label": True}, "completion_missing"),
        ({**TEXT, "score": 3}, "unknown_key"),
        ({**TEXT, "completion": " "}, "completion_empty"),
        ({**TURNS, "completion": "five"}, "prompt_unlike_completion"),
        ({**TURNS, "completion": [*TURNS["completion"], SAID]}, "several_answers"),
        ({**TURNS, "prompt": [*TURNS["prompt"], SAID]}, "prompt_ends_with_answer"),
        ({**TURNS, "completion": [{**SAID, "weight": 1}]}, "invalid_weight"),
    ],
)
def test_a_row_that_is_wrong_is_refused_with_its_line_and_what_to_write(row: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidRequest, match="Line 2: ") as caught:
        checked(TEXT, row)

    assert caught.value.code == code
    assert caught.value.remedy


def test_a_label_among_rows_without_is_told_as_another_kind() -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked({"prompt": "a", "completion": "b"}, TEXT)

    assert caught.value.code == "mixed_kinds"
