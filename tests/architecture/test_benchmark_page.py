"""The page of benchmark results shows stored results in standard terms, and changes no figure."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools.benchmark_labels import standard
from tools.benchmark_page import RESULTS, THEMES, rows

STORED = sorted(RESULTS.glob("*.json"))


def stored(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_labels_in_standard_terms_are_unambiguous_and_stay_unchanged(path: Path) -> None:
    result = stored(path)
    patterns = THEMES[result["theme"]].patterns

    found = standard([finding["what"] for finding in result["findings"]], patterns)

    assert standard(found, patterns) == found
    assert len(set(found)) == len(found)
    assert not any("{" in label for label in found)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_figure_of_a_result_is_in_its_table(path: Path) -> None:
    result = stored(path)

    shown = [row.result for row in rows(result)]

    assert [text.split()[0] for text in shown] == [f"{finding['figure']:,g}" for finding in result["findings"]]


def test_a_part_is_labeled_with_the_measurement_above_it() -> None:
    patterns = {"whole": "Whole: time", "part": "{previous}, by CPU time", "rest": "{group}: rest"}

    assert standard(["whole", "  part", "  rest"], patterns) == [
        "Whole: time",
        "Whole: time, by CPU time",
        "Whole: rest",
    ]
