"""What is printed of a comparison."""

from __future__ import annotations

import pytest

from benchmarks.results import Result, print_table, shares


@pytest.mark.parametrize(("figure", "said"), [(2.0, "any meets every goal."), (0.5, "any misses a goal.")])
def test_a_comparison_that_is_explained_is_told_by_its_goals(
    figure: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = Result(theme="any", settings={}, profile=shares("a step", {"LoRA": 1.0}), why=["So it is."])
    result.find("ours over theirs", figure, "x", goal=1.0)

    print_table([result])

    table = capsys.readouterr().out
    assert said in table
    assert table.count("goal.") == 1
    assert "So it is." in table
