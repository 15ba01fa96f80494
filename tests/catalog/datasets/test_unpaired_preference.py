"""Labeled completions: accepted rows, and the errors of rejected ones."""

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
ANSWER = {"role": "assistant", "content": "4"}


def checked(*rows: dict[str, Any]) -> tuple[int, str]:
    lines = io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())
    found = inspect(lines, max_line_bytes=10_000, max_rows=100)
    return found.num_rows, found.kind


def test_labeled_completions_may_be_text_or_messages() -> None:
    assert checked(TEXT, {**TEXT, "label": False}) == (2, "unpaired")
    assert checked(TURNS) == (1, "unpaired")


def test_unlabeled_completion_is_another_kind() -> None:
    assert checked({"prompt": "a", "completion": "b"}) == (1, "completion")


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "a", "completion": "b"}, "invalid_row"),
        ({**TEXT, "label": 1}, "invalid_row"),
        ({**TEXT, "label": "true"}, "invalid_row"),
        ({**TEXT, "label": None}, "invalid_row"),
        ({"prompt": "a", "label": True}, "invalid_row"),
        ({**TEXT, "score": 3}, "invalid_row"),
        ({**TEXT, "completion": " "}, "invalid_row"),
        ({**TURNS, "completion": "five"}, "invalid_row"),
        ({**TURNS, "completion": [*TURNS["completion"], ANSWER]}, "invalid_row"),
        ({**TURNS, "prompt": [*TURNS["prompt"], ANSWER]}, "invalid_row"),
        ({**TURNS, "completion": [{**ANSWER, "weight": 1}]}, "invalid_row"),
    ],
)
def test_invalid_row_is_rejected_with_its_line_and_a_remedy(row: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidRequest, match="Line 2: ") as caught:
        checked(TEXT, row)

    assert caught.value.code == code
    assert caught.value.remedy


def test_labeled_row_after_unlabeled_ones_is_rejected() -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked({"prompt": "a", "completion": "b"}, TEXT)

    assert caught.value.code == "invalid_row"
