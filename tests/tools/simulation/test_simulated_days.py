"""Properties of simulated days: the scheduling rules run over generated traces."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from catalog.scheduling.snapshot import USUAL
from tests.catalog.scheduling.bounds import most_before
from tools.simulation.queue import Arrival
from tools.simulation.simulator import Cluster, Simulation, summary

DAY = 86_400.0
WEIGHTS = st.tuples(*[st.sampled_from([1.0, 2.0, 3.0])] * 3)
SECONDS = st.floats(300, 3600)
ARRIVALS = st.builds(
    Arrival,
    at=st.floats(0, 20_000),
    project=st.sampled_from("abc"),
    priority=st.integers(0, 2),
    base=st.sampled_from("xyz"),
    seconds=st.floats(60, 4000),
)
CLUSTERS = st.builds(Cluster, num_workers=st.integers(1, 3), max_jobs=st.integers(1, 4))
MOST_DUE = 3 / 5
"""The largest fraction of the day for one of three projects. No project may run out of jobs before the day ends."""
few = settings(max_examples=5, deadline=None)  # a deadline would make tests depend on elapsed time


@few
@given(WEIGHTS, st.lists(SECONDS, min_size=20, max_size=40), st.integers(2, 4))
@example((1.0, 1.0, 2.0), [300.0] * 20, 2)  # a project ran out of jobs before the day ended
def test_daily_shares_are_close_to_the_weights(weights: tuple[float, ...], lengths: list[float], max_jobs: int) -> None:
    due = dict(zip("abc", weights, strict=True))
    cluster = Cluster(num_workers=3, max_jobs=max_jobs, weights=due)
    most_seconds = MOST_DUE * DAY * cluster.num_workers * max_jobs  # a packed job may be as fast as one alone
    jobs = [
        Arrival(at=0, project=name, priority=1, base="xy"[number % 2], seconds=lengths[number % len(lengths)])
        for name in due
        for number in range(math.ceil(most_seconds / (sum(lengths) / len(lengths))) + len(lengths))
    ]
    simulation = Simulation(jobs, cluster)

    simulation.run(until=DAY)

    parts = {name: entry["part"] for name, entry in summary(simulation)["projects"].items()}
    off = {name: round(parts[name] - weight / sum(weights), 3) for name, weight in due.items()}
    assert {name: by for name, by in off.items() if abs(by) >= 0.05} == {}


@pytest.mark.slow
@few
@given(st.lists(st.floats(60, 1500), min_size=5, max_size=10), st.integers(1, 3), st.integers(1, 4))
def test_batch_job_for_a_rare_base_starts_within_the_bound(
    lengths: list[float], num_workers: int, max_jobs: int
) -> None:
    """Urgent jobs for a popular base model arrive without end, and batch jobs join their trainers."""
    stream = [
        Arrival(at=60.0 * n, project="a", priority=priority, base="popular", seconds=lengths[n % len(lengths)])
        for n in range(350)
        for priority in (0, 2)
    ]
    patient = Arrival(at=0, project="b", priority=2, base="rare", seconds=60)
    simulation = Simulation([*stream, patient], Cluster(num_workers=num_workers, max_jobs=max_jobs))

    records = simulation.run(until=21_000)

    (record,) = (record for record in records if record.arrival is patient)
    seconds, most = most_before(2)
    slowest = 4 * max(lengths) + simulation.cluster.load_seconds
    assert record.started_at is not None
    assert record.waited <= seconds + (most + 1) * slowest


@few
@given(st.lists(ARRIVALS, min_size=1, max_size=60), CLUSTERS)
def test_preemption_loses_no_work_and_is_limited_per_job(jobs: list[Arrival], cluster: Cluster) -> None:
    policy = replace(USUAL, spared_seconds=120)
    simulation = Simulation(jobs, replace(cluster, policy=policy))

    records = simulation.run()

    for record in records:
        assert record.ended_at is not None
        assert record.num_preemptions <= policy.max_preemptions
        assert record.num_preemptions == 0 or record.arrival.priority > 0
        assert abs(record.trained - record.arrival.seconds) < 1e-3, "the work before a preemption must not be lost"
