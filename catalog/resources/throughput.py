"""Limits the jobs of a trainer by how much they slow each other down (LORRY_MAX_SLOWDOWN). Pure.

Jobs of a trainer share its tokens per second equally. A larger tick has a higher throughput, up to a plateau. Below the
plateau one more job costs the others little; beyond it every job slows down all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from catalog.settings import Settings

Point = tuple[float, float]
"""(tokens of a tick, tokens per second)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """The measured speeds of a trainer's ticks by size: of ticks with one job, and with several."""

    alone: tuple[Point, ...] = ()
    together: tuple[Point, ...] = ()

    @classmethod
    def of_report(cls, report: Any) -> Speeds:
        """Return the speeds of a trainer's `tick_speeds`; empty if the trainer reported none."""
        if not isinstance(report, dict):
            return cls()
        points = cast(dict[str, list[list[float]]], report)
        return cls(alone=_points(points.get("alone", ())), together=_points(points.get("together", ())))


UNKNOWN = Speeds()


def slowdown(num_jobs: int, speeds: Speeds) -> float:
    """Return how many times longer each of `num_jobs` takes than alone: an upper bound.

    It is calculated for the tick size at which a job alone was fastest, because such a job loses the most. No gain is
    assumed beyond the largest tick that was measured. Without measurements each of n jobs has an nth of its speed. Each
    job that joins lets the trainer measure a larger tick.
    """
    if num_jobs <= 1 or not speeds.alone:
        return float(max(1, num_jobs))
    tokens, alone = max(speeds.alone, key=lambda point: point[1])
    known = sorted({(tokens, alone), *(point for point in speeds.together if point[0] > tokens)})
    return num_jobs * alone / _rate_at(num_jobs * tokens, known)


def rate_alone(speeds: Speeds, num_tokens: float) -> float | None:
    """Return the tokens per second of one job with `num_tokens` per step; None if no tick of one job was measured."""
    known = sorted(speeds.alone)
    return _rate_at(max(num_tokens, known[0][0]), known) if known else None


def free_places(num_jobs: int, speeds: Speeds, *, max_slowdown: float, at_most: int) -> int:
    """Return how many jobs, at most `at_most`, may join `num_jobs` others within `max_slowdown`.

    The first job of a trainer always fits, because its slowdown is 1.
    """
    places = 0
    while places < at_most and slowdown(num_jobs + places + 1, speeds) <= max_slowdown:
        places += 1
    return places


def described(num_jobs: int, speeds: Speeds, settings: Settings, places: int) -> dict[str, Any]:
    """Return the saturation of a trainer, as its worker reports it for explanations and for operators."""
    is_full = places == 0 and num_jobs < settings.max_jobs_per_trainer
    return {
        "num_jobs": num_jobs,
        "slowdown": round(slowdown(num_jobs, speeds), 2),
        "slowdown_with_one_more": round(slowdown(num_jobs + 1, speeds), 2),
        "max_slowdown": settings.max_slowdown,
        "is_full": is_full,
    }


def explained(saturation: Any) -> str | None:
    """Return a sentence if a worker reports that its trainer is full because of LORRY_MAX_SLOWDOWN, else None."""
    if not isinstance(saturation, dict) or not cast(dict[str, Any], saturation).get("is_full"):
        return None
    found = cast(dict[str, Any], saturation)
    return (
        f"Its base model is loaded, but the trainer is full: with {found['num_jobs']} jobs, each takes up to "
        f"{found['slowdown']:g} times as long as alone. One more job would raise this to "
        f"{found['slowdown_with_one_more']:g}, and LORRY_MAX_SLOWDOWN is {found['max_slowdown']:g}. "
        "The job starts when one of them finishes."
    )


def _rate_at(tokens: float, known: Sequence[Point]) -> float:
    """Interpolate linearly between the two nearest sizes; beyond the largest size, return its rate."""
    for (fewer, slower), (more, faster) in pairwise(known):
        if tokens <= more:
            return slower + (faster - slower) * (tokens - fewer) / (more - fewer)
    return known[-1][1]


def _points(pairs: Iterable[Sequence[float]]) -> tuple[Point, ...]:
    points = ((float(tokens), float(rate)) for tokens, rate in pairs)
    return tuple(point for point in points if all(0 < number < math.inf for number in point))
