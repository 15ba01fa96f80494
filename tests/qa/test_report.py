"""The table at the end of a run: skipped rows are not counted as tried, and rows with findings count as failed."""

from __future__ import annotations

from qa.chaos.audit.findings import Finding
from qa.chaos.report import Outcome, table
from qa.chaos.scenario import NotHere, Row

ROW = Row(name="row", fault="a fault", also="all is well", act=lambda _: "")


def test_tried_skipped_and_failed_rows_are_counted_separately() -> None:
    finding = Finding(invariant="I1", subject="job", sentence="it never ended")
    outcomes = [
        Outcome(row=ROW, database="sqlite", seen="well", seconds=60.0),
        Outcome(row=ROW, database="postgresql", left_out="no such program"),
        Outcome(row=ROW, database="sqlite", failure="AssertionError: it took 99 s", seconds=60.0),
        Outcome(row=ROW, database="sqlite", findings=[finding]),
    ]

    report = table(outcomes, [NotHere(name="cuda", fault="another", why="no GPU")])

    assert report.splitlines()[-1] == "3 tried, 1 left out, 2 failed, 2 minutes."
    assert "left out: no such program" in report
    assert "not here: no GPU" in report
