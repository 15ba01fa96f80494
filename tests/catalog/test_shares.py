"""What projects have had, against what they are due."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catalog.scheduling import shares
from catalog.scheduling.picture import Policy, Service, Share
from catalog.scheduling.turns import Turn, most_before, order
from tests.catalog.test_fair_share import candidate

POLICY = Policy()
P = POLICY.promote_after_seconds
DAY = 86_400.0


def test_jobs_that_train_together_share_what_their_trainer_holds() -> None:
    assert shares.charge(10, num_devices=2, num_jobs=4) == 5
    assert shares.charge(10, num_devices=1, num_jobs=1) == 10
    assert shares.charge(-3, num_devices=1, num_jobs=1) == 0, "a clock that was set back"


@given(st.floats(0, 1e9), st.floats(0, 1e6), st.floats(0, 1e6))
def test_what_was_used_counts_half_after_a_half_life_whenever_one_looks(
    amount: float, first: float, then: float
) -> None:
    looked = shares.decay(shares.decay(amount, first, half_life_seconds=DAY), then, half_life_seconds=DAY)

    assert looked == pytest.approx(shares.decay(amount, first + then, half_life_seconds=DAY))
    assert shares.decay(amount, DAY, half_life_seconds=DAY) == amount / 2
    assert shares.decay(amount, -5, half_life_seconds=DAY) == amount


def firsts(turns: list[Turn]) -> list[str]:
    return [turn.candidate.job_id for turn in turns]


def test_who_has_had_less_for_its_weight_goes_first() -> None:
    waiting = [candidate("a", 0, "a"), candidate("b", 1, "b")]
    had = {"a": Share(device_seconds=1000), "b": Share(device_seconds=1500)}

    assert firsts(order(waiting, 10, shares=had)) == ["a", "b"]
    assert firsts(order(waiting, 10, shares={**had, "b": replace(had["b"], weight=2)})) == ["b", "a"]


def test_a_class_still_comes_before_what_was_had() -> None:
    waiting = [candidate("a", 0, "a", priority=0), candidate("b", 0, "b")]

    assert firsts(order(waiting, 10, shares={"a": Share(device_seconds=1e9)})) == ["a", "b"]


def test_a_turn_tells_what_its_project_has_had_and_that_its_waiting_counts() -> None:
    had = {"p": Share(device_seconds=1234, weight=2)}
    (turn,) = order([candidate("old", priority=2)], 2 * P, shares=had)

    assert turn.reason == (
        "priority batch, as if urgent for the waiting of its class; none of its project's jobs runs or, in its class, "
        "waits before it; its project has had 1234 device-seconds of late, at weight 2; waited 7200 s"
    )


def test_batch_is_passed_by_what_is_urgent_only_for_so_long() -> None:
    def first(now: float, **given: Any) -> str:
        waiting = [candidate("old", 0, "a", 2), candidate("new", now - 1, "b", 0)]
        return firsts(order(waiting, now, shares={"a": Share(device_seconds=1)}, **given))[0]

    assert [first(3 * P - 1), first(3 * P)] == ["new", "old"]
    turn = Service(at={2: 1.0}, memory_bytes=11)
    assert first(3 * P, served=[turn]) == "new", "its class had a turn since it came"
    assert first(3 * P, served=[replace(turn, memory_bytes=10)]) == "old", "on a worker that can't hold it"
    assert first(3 * P, served=[Service(at={2: 3 * P + 9}, memory_bytes=11)]) == "old", "by a clock that was set back"


def test_of_a_class_that_has_waited_one_job_rises() -> None:
    waiting = [candidate("b1", 0, "a", 2), candidate("b2", 0, "b", 2), candidate("new", 4 * P, "c", 1)]

    assert firsts(order(waiting, 4 * P)) == ["b1", "new", "b2"]
    assert firsts(order(waiting, 4 * P, shares={"a": Share(devices_held=1)})) == ["b2", "new", "b1"]


PAUSES = st.lists(st.floats(0, 2 * P), min_size=30, max_size=40)


@given(PAUSES, st.lists(st.floats(0, 10 * DAY), min_size=40, max_size=40))
def test_no_class_waits_longer_than_is_stated(pauses: list[float], charges: list[float]) -> None:
    """Jobs of each class wait at every moment, of two projects; each time that a device is free, the first starts."""
    came, served, passed = dict.fromkeys(range(3), 0.0), dict[int, float](), dict.fromkeys(range(3), 0)
    had, now = {"a": Share(), "b": Share(weight=3)}, 0.0
    for pause, charged in zip(pauses, charges, strict=False):
        now += pause
        waiting = [candidate(f"{name}{c}", came[c], name, c) for name in had for c in range(3)]
        chosen = order(waiting, now, shares=had, served=[Service(at=served, memory_bytes=11)])[0].candidate
        for other in set(came) - {chosen.priority}:
            seconds, most = most_before(other)
            passed[other] += now - max(came[other], served.get(other, 0.0)) >= seconds
            assert passed[other] <= most
        passed[chosen.priority] = 0
        served[chosen.priority] = came[chosen.priority] = now
        share = had[chosen.project_id]
        had[chosen.project_id] = replace(share, device_seconds=share.device_seconds + charged)


def a_day(had: dict[str, Share], lengths: list[float]) -> Iterator[tuple[float, str, float]]:
    """One device, more to do for every project than it can do: (time, whose job ended, its seconds). `had` is kept."""
    now, ends = 0.0, cycle(lengths)
    served: dict[int, float] = {}
    while now < DAY:
        waiting = [candidate(name, 0, name) for name in had]
        chosen = order(waiting, now, shares=had, served=[Service(at=served, memory_bytes=11)])[0].candidate.project_id
        served[1] = now
        seconds = next(ends)
        now += seconds
        for name, share in had.items():
            left = shares.decay(share.device_seconds, seconds, half_life_seconds=DAY)
            had[name] = replace(share, device_seconds=left + (seconds if name == chosen else 0))
        yield now, chosen, seconds


WEIGHTS = st.tuples(*[st.sampled_from([1.0, 2.0, 3.0])] * 3)
LENGTHS = st.lists(st.floats(300, 3600), min_size=20, max_size=40)


@given(LENGTHS, WEIGHTS)
def test_over_a_day_each_project_has_what_its_weight_is_due(lengths: list[float], weights: tuple[float, ...]) -> None:
    had = dict(zip("abc", (Share(weight=weight) for weight in weights), strict=True))
    total, now = dict.fromkeys("abc", 0.0), 0.0

    for now, name, seconds in a_day(had, lengths):  # noqa: B007
        total[name] += seconds

    due = {name: weight / sum(weights) for name, weight in zip("abc", weights, strict=True)}
    assert {name: abs(total[name] / now - due[name]) < 0.05 for name in due} == dict.fromkeys("abc", True)


@given(LENGTHS, WEIGHTS, st.floats(0, DAY))
def test_a_project_that_has_had_too_much_waits_no_longer_than_is_stated(
    lengths: list[float], weights: tuple[float, ...], excess: float
) -> None:
    had = dict(zip("abc", (Share(weight=weight) for weight in weights), strict=True))
    had["a"] = replace(had["a"], device_seconds=excess)
    bound = shares.longest_wait(
        had["a"].level(POLICY), of_others=weights[1:], longest_job=max(lengths), num_devices=1, policy=POLICY
    )

    began = next((now - seconds for now, name, seconds in a_day(had, lengths) if name == "a"), DAY)

    assert began <= bound


def test_a_share_is_told_as_data_and_in_a_sentence_that_names_nobody() -> None:
    had = {"mine": Share(device_seconds=300, weight=1), "other": Share(device_seconds=100, weight=3)}

    told = shares.described(had, "mine", POLICY)

    assert (told["weight"], told["num_projects"], told["projects_ahead"], told["level"]) == (1, 2, 1, 300)
    assert shares.sentence(told) == (
        "Of the 2 projects whose jobs wait, 1 has had less of late for the weight given, and goes first."
    )
    assert shares.sentence(shares.described({"mine": had["mine"]}, "mine", POLICY)) is None
    assert shares.sentence(shares.described(had, "other", POLICY)) == (
        "Of the 2 projects whose jobs wait, none has had less of late for its weight than its own."
    )


def test_what_a_project_is_told_of_shares_does_not_depend_on_others_weights_or_use() -> None:
    """Where one other waits, what is told of the whole would tell of that one."""
    mine = Share(device_seconds=300)

    told = [shares.described({"mine": mine, "other": other}, "mine", POLICY) for other in (Share(), Share(weight=7))]

    assert told[0] == told[1]
    everybody = shares.of_everybody({"mine": mine, "other": Share(device_seconds=100, weight=3)}, POLICY)
    assert [(row["project_id"], row["due"], row["part_of_use"]) for row in everybody] == [
        ("other", 0.75, 0.25),
        ("mine", 0.25, 0.75),
    ]


def test_jobs_that_share_a_device_count_in_advance_as_one_device() -> None:
    packed = Share(num_running=16, devices_held=1)

    assert packed.level(POLICY) == Share(num_running=1, devices_held=1).level(POLICY) == POLICY.advance_seconds
