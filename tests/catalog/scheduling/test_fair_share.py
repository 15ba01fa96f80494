"""Fair share: usage of projects compared with their entitlement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from catalog.scheduling import ordering
from catalog.scheduling.ordering import QueueEntry, order
from catalog.scheduling.snapshot import Policy, Share, WorkerService
from tests.catalog.scheduling.bounds import largest_loss, longest_wait, most_before
from tests.catalog.scheduling.test_fairness_over_days import candidate
from tools.simulation.queue import Arrival
from tools.simulation.simulator import Cluster, Simulation

POLICY = Policy()
P = POLICY.priority_aging_seconds
DAY = 86_400.0


def test_jobs_share_the_device_seconds_of_their_trainer() -> None:
    assert ordering.charge(10, num_devices=2, num_jobs=4) == 5
    assert ordering.charge(10, num_devices=1, num_jobs=1) == 10
    assert ordering.charge(-3, num_devices=1, num_jobs=1) == 0, "a clock that was set back charges nothing"


@given(st.floats(0, 1e9), st.floats(0, 1e6), st.floats(0, 1e6))
def test_usage_halves_per_half_life_at_any_read_times(amount: float, first: float, then: float) -> None:
    looked = ordering.decay(ordering.decay(amount, first, half_life_seconds=DAY), then, half_life_seconds=DAY)

    assert looked == pytest.approx(ordering.decay(amount, first + then, half_life_seconds=DAY))
    assert ordering.decay(amount, DAY, half_life_seconds=DAY) == amount / 2
    assert ordering.decay(amount, -5, half_life_seconds=DAY) == amount


def firsts(entries: list[QueueEntry]) -> list[str]:
    return [entry.candidate.job_id for entry in entries]


def test_project_with_lower_normalized_usage_goes_first() -> None:
    waiting = [candidate("a", 0, "a"), candidate("b", 1, "b")]
    had = {"a": Share(device_seconds=1000), "b": Share(device_seconds=1500)}

    assert firsts(order(waiting, 10, shares=had)) == ["a", "b"]
    assert firsts(order(waiting, 10, shares={**had, "b": replace(had["b"], weight=2)})) == ["b", "a"]


@pytest.mark.parametrize(("of_a", "of_b", "steps"), [(0, 1, 1), (1, 2, 1), (0, 2, 2)])
def test_priority_class_outweighs_a_limited_usage_difference(of_a: int, of_b: int, steps: int) -> None:
    waiting = [candidate("a", 0, "a", of_a), candidate("b", 0, "b", of_b)]
    head_start = steps * POLICY.class_step_seconds

    def first(device_seconds: float, weight: float = 1) -> str:
        return firsts(order(waiting, 10, shares={"a": Share(device_seconds=device_seconds, weight=weight)}))[0]

    assert [first(head_start - 1), first(head_start + 1)] == ["a", "b"]
    assert [first(3 * head_start - 3, 3), first(3 * head_start + 3, 3)] == ["a", "b"]


def test_priority_class_decides_within_a_project() -> None:
    waiting = [candidate("normal"), candidate("urgent", 5, priority=0), candidate("batch", -5, priority=2)]

    assert firsts(order(waiting, 10, shares={"p": Share(device_seconds=1e9)})) == ["urgent", "normal", "batch"]


def test_position_reason_names_usage_and_aging() -> None:
    had = {"p": Share(device_seconds=1234, weight=2)}
    (entry,) = order([candidate("old", priority=2)], 2 * P, shares=had)

    assert entry.reason == (
        "priority batch, promoted to urgent within its project by priority aging; no other job of its project runs or "
        "waits before it; its project was charged 1234 device-seconds recently, at weight 2; waited 7200 s"
    )


def test_batch_job_is_promoted_after_the_aging_time() -> None:
    def first(now: float, **given: Any) -> str:
        waiting = [candidate("old", 0, priority=2), candidate("new", now - 1, priority=0)]
        return firsts(order(waiting, now, **given))[0]

    assert [first(2 * P - 1), first(2 * P)] == ["new", "old"]
    entry = WorkerService(at={("p", 2): 1.0}, memory_bytes=11)
    assert first(2 * P, served=[entry]) == "new", "its class had a turn since the job was queued"
    assert first(2 * P, served=[replace(entry, at={("other", 2): 1.0})]) == "old", (
        "the turn of another project does not count"
    )
    assert first(2 * P, served=[replace(entry, memory_bytes=10)]) == "old", (
        "a turn on a worker too small for the job does not count"
    )
    ahead = WorkerService(at={("p", 2): 2 * P + 9}, memory_bytes=11)
    assert first(2 * P, served=[ahead]) == "old", "a future turn, from a clock that was set back, does not count"


def test_only_one_job_of_a_waiting_class_is_promoted() -> None:
    waiting = [candidate("b1", 0, priority=2), candidate("b2", 0, priority=2), candidate("new", 4 * P)]

    assert firsts(order(waiting, 4 * P)) == ["b1", "new", "b2"]


def test_promotion_gains_nothing_over_other_projects() -> None:
    waiting = [candidate("risen", 0, "a", 2), candidate("normal", 99 * P, "b")]

    assert firsts(order(waiting, 99 * P, shares={"a": Share(device_seconds=1)})) == ["normal", "risen"]
    pressing = candidate("urgent", 98 * P, "a", 0)
    assert firsts(order([*waiting, pressing], 99 * P)) == ["risen", "urgent", "normal"], (
        "the promoted job takes the position of the urgent one"
    )


PAUSES = st.lists(st.floats(0, 2 * P), min_size=30, max_size=40)


@given(PAUSES, st.lists(st.floats(0, DAY), min_size=40, max_size=40))
def test_no_class_waits_longer_than_the_stated_bound(pauses: list[float], charges: list[float]) -> None:
    """Jobs of each class of two projects wait at every moment. Each time a device is free, the first job starts."""
    groups = [(name, priority) for name in "ab" for priority in range(3)]
    came, served, passed = dict.fromkeys(groups, 0.0), dict[tuple[str, int], float](), dict.fromkeys(groups, 0)
    had, now = {"a": Share(), "b": Share(weight=3)}, 0.0
    for pause, charged in zip(pauses, charges, strict=False):
        now += pause
        waiting = [candidate(f"{name}{c}", came[name, c], name, c) for name, c in groups]
        chosen = order(waiting, now, shares=had, served=[WorkerService(at=served, memory_bytes=11)])[0].candidate
        group = (chosen.project_id, chosen.priority)
        for other in [(name, c) for name, c in groups if name == chosen.project_id and c != chosen.priority]:
            seconds, most = most_before(other[1])
            passed[other] += now - max(came[other], served.get(other, 0.0)) >= seconds
            assert passed[other] <= most
        passed[group] = 0
        served[group] = came[group] = now
        share = had[chosen.project_id]
        had[chosen.project_id] = replace(share, device_seconds=share.device_seconds + charged)


def a_day(had: dict[str, Share], lengths: list[float]) -> Iterator[tuple[float, str, float]]:
    """Simulate one device with endless jobs of every project.

    Yields the time, the project and the seconds of each ended job, and keeps `had` up to date.
    """
    now, ends = 0.0, cycle(lengths)
    served: dict[tuple[str, int], float] = {}
    while now < DAY:
        waiting = [candidate(name, 0, name) for name in had]
        chosen = order(waiting, now, shares=had, served=[WorkerService(at=served, memory_bytes=11)])[
            0
        ].candidate.project_id
        served[chosen, 1] = now
        seconds = next(ends)
        now += seconds
        for name, share in had.items():
            left = ordering.decay(share.device_seconds, seconds, half_life_seconds=DAY)
            had[name] = replace(share, device_seconds=left + (seconds if name == chosen else 0))
        yield now, chosen, seconds


WEIGHTS = st.tuples(*[st.sampled_from([1.0, 2.0, 3.0])] * 3)
LENGTHS = st.lists(st.floats(300, 3600), min_size=20, max_size=40)


@given(LENGTHS, WEIGHTS)
def test_projects_receive_their_fair_share_over_a_day(lengths: list[float], weights: tuple[float, ...]) -> None:
    had = dict(zip("abc", (Share(weight=weight) for weight in weights), strict=True))
    total, now = dict.fromkeys("abc", 0.0), 0.0

    for now, name, seconds in a_day(had, lengths):  # noqa: B007
        total[name] += seconds

    due = {name: weight / sum(weights) for name, weight in zip("abc", weights, strict=True)}
    assert {name: abs(total[name] / now - due[name]) < 0.05 for name in due} == dict.fromkeys("abc", True)


@given(LENGTHS, WEIGHTS, st.floats(0, DAY))
def test_overserved_project_waits_no_longer_than_the_stated_bound(
    lengths: list[float], weights: tuple[float, ...], excess: float
) -> None:
    had = dict(zip("abc", (Share(weight=weight) for weight in weights), strict=True))
    had["a"] = replace(had["a"], device_seconds=excess)
    bound = longest_wait(
        had["a"].level(POLICY), of_others=weights[1:], longest_job=max(lengths), num_devices=1, policy=POLICY
    )

    began = next((now - seconds for now, name, seconds in a_day(had, lengths) if name == "a"), DAY)

    assert began <= bound


def test_share_description_names_no_other_project() -> None:
    had = {"mine": Share(device_seconds=300, weight=1), "other": Share(device_seconds=100, weight=3)}

    described = ordering.describe_share(had, "mine", POLICY)

    assert (
        described["weight"],
        described["num_projects"],
        described["projects_ahead"],
        described["normalized_usage"],
    ) == (1, 2, 1, 300)
    assert ordering.share_sentence(described) == (
        "2 projects have queued jobs. 1 of them has less recent usage, relative to weight."
    )
    assert ordering.share_sentence(ordering.describe_share({"mine": had["mine"]}, "mine", POLICY)) is None
    assert ordering.share_sentence(ordering.describe_share(had, "other", POLICY)) == (
        "2 projects have queued jobs. None has less recent usage, relative to its weight."
    )


def test_share_description_does_not_depend_on_others_weights_or_usage() -> None:
    """With a single other project, a total would reveal that project's values."""
    mine = Share(device_seconds=300)

    described = [
        ordering.describe_share({"mine": mine, "other": other}, "mine", POLICY) for other in (Share(), Share(weight=7))
    ]

    assert described[0] == described[1]
    all_rows = ordering.all_shares({"mine": mine, "other": Share(device_seconds=100, weight=3)}, POLICY)
    assert [(row["project_id"], row["fair_share"], row["usage_fraction"]) for row in all_rows] == [
        ("other", 0.75, 0.25),
        ("mine", 0.25, 0.75),
    ]


def test_packed_jobs_count_as_one_device_in_advance() -> None:
    packed = Share(num_running=16, devices_in_use=1)

    assert packed.level(POLICY) == Share(num_running=1, devices_in_use=1).level(POLICY) == POLICY.advance_seconds


BURSTS = st.lists(
    st.tuples(
        st.floats(0, DAY / 2),  # time of submission
        st.integers(0, 2),  # class
        st.integers(1, 60),  # number of jobs
        st.floats(1800, 5400),  # seconds of each
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=8)
@given(
    BURSTS,
    st.lists(st.floats(1800, 5400), min_size=5, max_size=10),
    st.integers(1, 2),
    st.sampled_from([(1.0, 1.0), (1.0, 3.0), (2.0, 1.0)]),
    st.integers(1, 3),
)
@example([(0.0, 0, 60, 3600.0)], [1800.0], 1, (1.0, 1.0), 2)
@example([(0.0, 0, 60, 3600.0)], [1800.0], 2, (1.0, 1.0), 2)
@example([(0.0, 1, 60, 3600.0)], [1800.0], 2, (1.0, 1.0), 2)
def test_class_choices_take_at_most_the_bound_from_another_project(
    bursts: list[tuple[float, int, int, float]],
    lengths: list[float],
    own_class: int,
    weights: tuple[float, float],
    num_workers: int,
) -> None:
    """The project `steady` has queued jobs all day. The other one chooses classes, times, numbers and lengths."""
    due_by: dict[str, float] = dict(zip(("steady", "greedy"), weights, strict=True))
    policy = replace(POLICY, ask_again_seconds=900)  # fewer preemption decisions make the simulation faster
    cluster = Cluster(num_workers=num_workers, max_jobs=1, weights=due_by, policy=policy)
    num_needed = int(DAY * num_workers / min(lengths)) + len(lengths)
    steady = [
        Arrival(at=0, project="steady", priority=own_class, base="x", seconds=lengths[number % len(lengths)])
        for number in range(num_needed)
    ]
    greedy = [
        Arrival(at=at, project="greedy", priority=priority, base="x", seconds=seconds)
        for at, priority, number, seconds in bursts
        for _ in range(number)
    ]
    simulation = Simulation([*steady, *greedy], cluster)

    records = simulation.run(until=DAY)

    had = {name: sum(r.device_seconds for r in records if r.arrival.project == name) for name in cluster.weights}
    due = sum(had.values()) * weights[0] / sum(weights)
    bound = largest_loss(
        weights[0],
        of_others=weights[1:],
        longest_job=max(*lengths, *(seconds for _, _, _, seconds in bursts)),
        num_devices=num_workers,
        seconds=DAY,
        policy=POLICY,
    )
    assert due - had["steady"] <= bound
