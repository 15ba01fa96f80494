"""How many jobs share a trainer before one of them is slowed down by more than was promised."""

from __future__ import annotations

import pytest

from catalog.resources.throughput import UNKNOWN, Speeds, free_places, slowdown

FLAT = Speeds(alone=((64, 900.0),), together=((128, 900.0), (256, 900.0)))
STEEP = Speeds(alone=((64, 500.0),), together=((128, 950.0), (256, 1600.0), (512, 2000.0)))


def places(num_jobs: int, speeds: Speeds, *, max_slowdown: float = 4, at_most: int = 16) -> int:
    return free_places(num_jobs, speeds, max_slowdown=max_slowdown, at_most=at_most)


def test_before_anything_is_known_each_job_is_taken_to_slow_down_all_others() -> None:
    assert [slowdown(number, UNKNOWN) for number in (0, 1, 2, 5)] == [1, 1, 2, 5]
    assert [places(number, UNKNOWN) for number in (0, 3, 4, 9)] == [4, 1, 0, 0]


def test_on_the_plateau_no_more_jobs_come_in_than_the_bound_says() -> None:
    assert slowdown(3, FLAT) == pytest.approx(3)
    assert places(0, FLAT) == 4
    assert places(0, FLAT, max_slowdown=1.5) == 1


def test_below_the_plateau_more_jobs_come_in_for_they_slow_each_other_down_less() -> None:
    assert slowdown(2, STEEP) == pytest.approx(2 * 500 / 950)
    assert slowdown(8, STEEP) == pytest.approx(8 * 500 / 2000)
    assert places(0, STEEP) == 16


def test_no_gain_is_counted_on_beyond_the_largest_tick_that_was_seen() -> None:
    assert slowdown(16, STEEP) == pytest.approx(16 * 500 / 2000)
    assert places(8, STEEP, at_most=100) == 8


def test_between_two_sizes_the_speed_lies_on_the_line() -> None:
    assert slowdown(3, STEEP) == pytest.approx(3 * 500 / 1275)


def test_the_job_that_has_most_to_lose_is_the_one_that_counts() -> None:
    mixed = Speeds(alone=((64, 500.0), (400, 2000.0)), together=((464, 2000.0),))

    assert slowdown(2, mixed) == pytest.approx(2)


def test_the_first_job_is_let_in_whatever_the_bound() -> None:
    assert places(0, UNKNOWN, max_slowdown=1) == 1
    assert places(0, UNKNOWN, max_slowdown=1, at_most=0) == 0


def test_what_a_trainer_reports_is_read_and_no_report_is_no_knowledge() -> None:
    told = {"alone": [[64, 500.0]], "together": []}

    assert Speeds.of_report(told) == Speeds(alone=((64.0, 500.0),))
    assert Speeds.of_report(None) == UNKNOWN
