"""The cluster simulator, which runs the scheduling rules themselves."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from catalog.resources.throughput import slowdown
from tests.catalog.scheduling.bounds import most_before
from tools.simulation import workload
from tools.simulation.simulator import SPEEDS, Arrival, Cluster, Simulation, main, read_trace, summary

DAY = 86_400.0
HEADER = "submitted_at,project,priority,base,seconds"


def backlog(weights: dict[str, float], *, num_jobs: int, num_bases: int, priority: int = 1) -> Iterator[Arrival]:
    """Yield more jobs per project than there is time for, all submitted at the start."""
    chance = random.Random(7)
    for project in weights:
        for _ in range(num_jobs):
            base = f"base-{chance.randrange(num_bases)}"
            yield Arrival(at=0, project=project, priority=priority, base=base, seconds=chance.uniform(600, 7200))


def test_daily_shares_are_close_to_the_weights() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 3.0}
    simulation = Simulation(
        backlog(weights, num_jobs=150, num_bases=3), Cluster(num_workers=4, max_jobs=4, weights=weights)
    )

    simulation.run(until=DAY)

    parts = {name: result["part"] for name, result in summary(simulation)["projects"].items()}
    assert {name: abs(part - weights[name] / 6) < 0.05 for name, part in parts.items()} == dict.fromkeys("abc", True)
    assert simulation.now == DAY
    assert sum(record.ended_at is None for record in simulation.records) > 0, "jobs must remain at the end of the day"


def test_every_job_ends_and_is_charged_at_most_its_trainer_time() -> None:
    arrivals = [*backlog({"a": 1}, num_jobs=20, num_bases=2), *backlog({"b": 1}, num_jobs=20, num_bases=2, priority=2)]
    simulation = Simulation(arrivals, Cluster(num_workers=2))

    simulation.run()

    result = summary(simulation)
    assert result["ended"] == result["jobs"] == 40
    assert 0.5 < result["busy"] <= 1
    for record in simulation.records:
        assert record.started_at is not None
        assert record.ended_at is not None
        alone = record.ended_at - record.started_at
        assert record.arrival.seconds <= alone + 1e-6
        assert record.device_seconds <= alone + 1e-6


def test_batch_job_starts_within_the_bound_under_endless_load() -> None:
    urgent = [Arrival(at=60.0 * n, project="a", priority=0, base="x", seconds=120) for n in range(600)]
    patient = Arrival(at=0, project="b", priority=2, base="y", seconds=60)
    simulation = Simulation([*urgent, patient], Cluster(num_workers=1, max_jobs=1))

    records = simulation.run()

    (record,) = (record for record in records if record.arrival is patient)
    seconds, most = most_before(2)
    assert record.waited <= seconds + (most + 1) * (120 + 60)


def test_urgent_jobs_of_a_project_below_its_share_start_within_minutes() -> None:
    pressing = [Arrival(at=3600.0 * n, project="b", priority=0, base=f"base-{n % 3}", seconds=1200) for n in range(12)]
    simulation = Simulation([*backlog({"a": 1}, num_jobs=300, num_bases=3), *pressing], Cluster(num_workers=4))

    records = simulation.run(until=DAY / 2)

    waits = [record.waited for record in records if record.arrival.project == "b" and record.started_at is not None]
    policy = simulation.cluster.policy
    assert len(waits) == len(pressing)
    assert max(waits) <= policy.preempt_after_seconds + policy.ask_again_seconds + policy.spared_seconds


def test_freed_capacity_starts_the_urgent_job_that_preempted() -> None:
    batch = Arrival(at=0, project="a", priority=2, base="x", seconds=1000)
    urgent = Arrival(at=400, project="a", priority=0, base="y", seconds=60)
    for_what_is_loaded = Arrival(at=425, project="a", priority=0, base="x", seconds=60)
    simulation = Simulation([batch, urgent, for_what_is_loaded], Cluster(num_workers=1, max_jobs=1, load_seconds=0))

    started = {record.arrival: record.started_at for record in simulation.run()}

    assert (started[urgent], started[for_what_is_loaded]) == (430, 490)


def test_single_job_takes_its_time_plus_the_base_load() -> None:
    simulation = Simulation(
        [Arrival(at=5, project="a", priority=1, base="x", seconds=100)], Cluster(num_workers=1, load_seconds=30)
    )

    (record,) = simulation.run()

    assert (record.started_at, record.ended_at, simulation.num_loads) == (5, 135, 1)
    assert slowdown(1, SPEEDS) == 1


def test_same_trace_gives_the_same_result() -> None:
    def day() -> dict[str, object]:
        simulation = Simulation(backlog({"a": 1, "b": 1}, num_jobs=20, num_bases=3), Cluster(num_workers=2))
        simulation.run()
        return summary(simulation)

    assert day() == day()


def test_command_reads_a_trace_and_prints_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(f"{HEADER}\n0,a,normal,x,10\n1,b,batch,x,10\n")

    assert main([str(trace), "--workers", "1", "--weight", "a=2"]) == 0

    result = json.loads(capsys.readouterr().out)
    assert (result["jobs"], result["ended"], sorted(result["classes"])) == (2, 2, ["batch", "normal"])


@pytest.mark.parametrize(
    "line", ["0,a,soon,x,10", "zero,a,normal,x,10", "0,a,normal", "0,a,normal,x,nan", "-1,a,normal,x,1"]
)
def test_invalid_trace_line_is_reported_with_its_number(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(f"{HEADER}\n0,a,normal,x,10\n{line}\n")

    assert main([str(trace)]) == 1
    assert "Line 3 of the trace" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Line 2"):
        read_trace([HEADER, line])


def test_invalid_weight_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(f"{HEADER}\n0,a,normal,x,10\n")

    assert main([str(trace), "--weight", "a=-1"]) == 1
    assert "Pass a number above 0" in capsys.readouterr().err
    assert main([str(trace), "--weight", "a"]) == 1


def test_documented_workload_is_a_reproducible_trace(capsys: pytest.CaptureFixture[str]) -> None:
    workload.main([])
    lines = capsys.readouterr().out.splitlines()

    arrivals = read_trace(lines)
    assert arrivals == workload.day()
    assert workload.day(2) != arrivals
    assert len(arrivals) == 2616
    assert (len({job.project for job in arrivals}), len({job.base for job in arrivals})) == (5, 40)
    assert {job.priority for job in arrivals} == {0, 1, 2}
