"""The table at the end of a run: skipped faults are not counted as tried, and faults with findings count as failed."""

from __future__ import annotations

from qa.chaos.__main__ import Outcome, table
from qa.chaos.audit.findings import Finding
from qa.chaos.environment import Fault
from qa.chaos.fault_table import FAULTS

FAULT = Fault(name="fault", what="a fault", promise="all is well", act=lambda _: "")


def test_tried_skipped_and_failed_faults_are_counted_separately() -> None:
    finding = Finding(invariant="I1", subject="job", sentence="it never ended")
    outcomes = [
        Outcome(fault=FAULT, database="sqlite", seen="well", seconds=60.0),
        Outcome(fault=FAULT, database="postgresql", left_out="no such program"),
        Outcome(fault=FAULT, database="sqlite", failure="AssertionError: it took 99 s", seconds=60.0),
        Outcome(fault=FAULT, database="sqlite", findings=[finding]),
    ]

    report = table(outcomes)

    assert report.splitlines()[-1] == "3 tried, 1 left out, 2 failed, 2 minutes."
    assert "left out: no such program" in report


def test_every_fault_has_a_name_of_its_own() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
