"""The page of benchmark results shows every stored result, with all of its figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.architecture.source_files import ROOT
from tools import benchmark_tables
from tools.benchmark_tables import RESULTS, benchmark, missed_goals

STORED = sorted(RESULTS.glob("*.json"))


def test_every_result_is_on_the_page() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")

    assert STORED
    assert [path.stem for path in STORED if f"<!-- generated: benchmark {path.stem} -->" not in page] == []


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_figure_of_a_result_is_in_its_table(path: Path) -> None:
    findings = json.loads(path.read_text(encoding="utf-8"))["findings"]

    rows = [line.strip("| ").split(" | ") for line in benchmark(path.stem).splitlines() if line.startswith("|")][2:]

    assert len({row[0] for row in rows}) == len(rows)
    assert [row[1].split()[0] for row in rows] == [f"{finding['figure']:,g}" for finding in findings]


def test_goals_are_compared_in_their_direction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goals = [(3.0, 2.0, False), (1.0, 2.0, False), (3.0, 2.0, True), (1.0, 2.0, True), (1.0, None, True)]
    findings = [
        {"what": f"row {number}", "figure": figure, "unit": "s", "goal": goal, "is_limit": is_limit}
        for number, (figure, goal, is_limit) in enumerate(goals)
    ]
    result: dict[str, Any] = {"theme": "speed", "date": "today", "note": None, "left_out": {}, "findings": findings}
    result["machine"] = {"cpu": "Xeon", "cores": 2}
    (tmp_path / "one.json").write_text(json.dumps(result))
    monkeypatch.setattr(benchmark_tables, "RESULTS", tmp_path)

    assert benchmark("one").splitlines()[-5:] == [
        "| row 0 | 3 s | at least 2: met |",
        "| row 1 | 1 s | at least 2: missed |",
        "| row 2 | 3 s | at most 2: missed |",
        "| row 3 | 1 s | at most 2: met |",
        "| row 4 | 1 s |  |",
    ]
    assert missed_goals().splitlines()[2:] == [
        "| `speed` | row 1 | 1 s | at least 2 |",
        "| `speed` | row 2 | 3 s | at most 2 |",
    ]
