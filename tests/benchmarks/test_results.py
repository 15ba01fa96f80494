"""The printed table of a comparison."""

from __future__ import annotations

import pytest

from benchmarks.results import Result, print_table, shares


@pytest.mark.parametrize(("figure", "verdict"), [(2.0, "any meets every goal."), (0.5, "any misses a goal.")])
def test_explained_comparison_reports_whether_it_meets_its_goals(
    figure: float, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = Result(theme="any", settings={}, profile=shares("a step", {"LoRA": 1.0}), why=["So it is."])
    result.find("ours over theirs", figure, "x", goal=1.0)

    print_table([result])

    table = capsys.readouterr().out
    assert verdict in table
    assert table.count("goal.") == 1
    assert "So it is." in table
