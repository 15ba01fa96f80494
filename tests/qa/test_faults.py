"""The faults that cover most mechanisms, on SQLite, and the table at the end of a run. `make test-faults` runs all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qa.chaos.__main__ import Outcome, table
from qa.chaos.audit.findings import Finding
from qa.chaos.environment import Fault, Ground
from qa.chaos.faults import FAULTS

FAULT = Fault(name="fault", what="a fault", promise="all is well", act=lambda _: "")
MOST_NEEDED = (
    *("worker-killed-after-claim", "worker-killed-storing", "worker-killed-in-complete"),
    *("worker-killed-after-complete", "worker-stopped", "all-sigterm", "job-poison", "checkpoint-damaged"),
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with Ground(tmp_path_factory.mktemp("faults")) as ground:
        yield ground


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MOST_NEEDED)
def test_a_service_keeps_its_promise_after_a_fault_and_violates_no_invariant(ground: Ground, name: str) -> None:
    fault = next(fault for fault in FAULTS if fault.name == name)
    with ground.site(fault, "sqlite") as site:
        fault.act(site)
        site.stop()

        assert site.audit() == []


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
