"""The number of jobs that share a trainer before one of them exceeds the slowdown limit."""

from __future__ import annotations

import pytest

from catalog.resources.throughput import UNKNOWN, Speeds, free_places, slowdown

FLAT = Speeds(alone=((64, 900.0),), together=((128, 900.0), (256, 900.0)))
STEEP = Speeds(alone=((64, 500.0),), together=((128, 950.0), (256, 1600.0), (512, 2000.0)))


def places(num_jobs: int, speeds: Speeds, *, max_slowdown: float = 4, at_most: int = 16) -> int:
    return free_places(num_jobs, speeds, max_slowdown=max_slowdown, at_most=at_most)


def test_unknown_speeds_assume_that_jobs_slow_each_other_fully() -> None:
    assert [slowdown(number, UNKNOWN) for number in (0, 1, 2, 5)] == [1, 1, 2, 5]
    assert [places(number, UNKNOWN) for number in (0, 3, 4, 9)] == [4, 1, 0, 0]


def test_saturated_trainer_accepts_jobs_up_to_the_limit() -> None:
    assert slowdown(3, FLAT) == pytest.approx(3)
    assert places(0, FLAT) == 4
    assert places(0, FLAT, max_slowdown=1.5) == 1


def test_unsaturated_trainer_accepts_more_jobs() -> None:
    assert slowdown(2, STEEP) == pytest.approx(2 * 500 / 950)
    assert slowdown(8, STEEP) == pytest.approx(8 * 500 / 2000)
    assert places(0, STEEP) == 16


def test_speed_is_not_extrapolated_beyond_the_largest_measured_tick() -> None:
    assert slowdown(16, STEEP) == pytest.approx(16 * 500 / 2000)
    assert places(8, STEEP, at_most=100) == 8


def test_speed_is_interpolated_between_measured_sizes() -> None:
    assert slowdown(3, STEEP) == pytest.approx(3 * 500 / 1275)


def test_limit_applies_to_the_job_that_is_slowed_most() -> None:
    mixed = Speeds(alone=((64, 500.0), (400, 2000.0)), together=((464, 2000.0),))

    assert slowdown(2, mixed) == pytest.approx(2)


def test_first_job_is_always_accepted() -> None:
    assert places(0, UNKNOWN, max_slowdown=1) == 1
    assert places(0, UNKNOWN, max_slowdown=1, at_most=0) == 0


def test_speeds_are_read_from_a_report_and_unknown_without_one() -> None:
    report = {"alone": [[64, 500.0]], "together": []}

    assert Speeds.of_report(report) == Speeds(alone=((64.0, 500.0),))
    assert Speeds.of_report(None) == UNKNOWN
