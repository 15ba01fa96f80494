"""The word overlap of an answer and its reference."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from demo_parts.word_overlap import f1, mean_f1  # pyright: ignore[reportMissingImports]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("return the Cosine, of x", 1.0),
        ("Return the sine of x.", 0.8),
        ("Return.", 1 / 3),
        ("x x x x x", 0.2),
        ("Nothing alike", 0.0),
        ("", 0.0),
    ],
)
def test_f1_compares_shared_words_with_those_of_answer_and_reference(answer: str, score: float) -> None:
    assert f1(answer, "Return the cosine of x.") == pytest.approx(score)


def test_the_mean_is_over_answers() -> None:
    assert mean_f1([("a", "a"), ("b", "a")]) == 0.5
