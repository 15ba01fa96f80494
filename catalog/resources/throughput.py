"""How many jobs a trainer takes: until each would be slowed down by more than was promised. Pure.

Jobs of a trainer get equal shares of its tokens a second. A larger tick is faster, up to a plateau: below it a
further job costs the others little, beyond it every job slows all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from catalog.settings import Settings

Point = tuple[float, float]
"""(tokens of a tick, tokens a second)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """What a trainer has learnt of its ticks: those of one job, and those of several; by size."""

    alone: tuple[Point, ...] = ()
    together: tuple[Point, ...] = ()

    @classmethod
    def of_report(cls, report: Any) -> Speeds:
        """A trainer's `tick_speeds`; nothing is known where it says none."""
        if not isinstance(report, dict):
            return cls()
        told = cast(dict[str, list[list[float]]], report)
        return cls(alone=_points(told.get("alone", ())), together=_points(told.get("together", ())))


UNKNOWN = Speeds()


def slowdown(num_jobs: int, speeds: Speeds) -> float:
    """By how much each of `num_jobs` is slower than alone: of those sizes that were seen, that of the job which has
    most to lose.

    Beyond the largest tick that was seen no further gain is counted on, and before any was, none at all: then a job
    among n has an n-th of its speed. So what is predicted is the most that it can be, and each job that joins lets
    the trainer learn of a larger tick.
    """
    if num_jobs <= 1 or not speeds.alone:
        return float(max(1, num_jobs))
    tokens, alone = max(speeds.alone, key=lambda point: point[1])
    known = sorted({(tokens, alone), *(point for point in speeds.together if point[0] > tokens)})
    return num_jobs * alone / _rate_at(num_jobs * tokens, known)


def rate_alone(speeds: Speeds, num_tokens: float) -> float | None:
    """Tokens a second of one job whose step has so many tokens; None where no tick of one job was seen yet."""
    known = sorted(speeds.alone)
    return _rate_at(max(num_tokens, known[0][0]), known) if known else None


def free_places(num_jobs: int, speeds: Speeds, *, max_slowdown: float, at_most: int) -> int:
    """Jobs that may join `num_jobs` others, at most `at_most`, so that none is slower than `max_slowdown` times. The
    first always may."""
    places = 0
    while places < at_most and slowdown(num_jobs + places + 1, speeds) <= max_slowdown:
        places += 1
    return places


def described(num_jobs: int, speeds: Speeds, settings: Settings, places: int) -> dict[str, Any]:
    """What a worker says of its trainer: for explanations, and for people who look at the worker."""
    is_full = places == 0 and num_jobs < settings.max_jobs_per_trainer
    return {
        "num_jobs": num_jobs,
        "slowdown": round(slowdown(num_jobs, speeds), 2),
        "slowdown_with_one_more": round(slowdown(num_jobs + 1, speeds), 2),
        "max_slowdown": settings.max_slowdown,
        "is_full": is_full,
    }


def explained(saturation: Any) -> str | None:
    """A sentence, where a worker's report says that its trainer takes no job because of the others' speed."""
    if not isinstance(saturation, dict) or not cast(dict[str, Any], saturation).get("is_full"):
        return None
    found = cast(dict[str, Any], saturation)
    return (
        f"Its base is loaded, and the trainer is near its plateau: with {found['num_jobs']} jobs each is at most "
        f"{found['slowdown']:g} times as slow as alone, one more would make that {found['slowdown_with_one_more']:g}, "
        f"and LORRY_MAX_SLOWDOWN is {found['max_slowdown']:g}. It joins when one of them ends."
    )


def _rate_at(tokens: float, known: Sequence[Point]) -> float:
    """On the line between the two sizes around it; beyond the last that of the last."""
    for (fewer, slower), (more, faster) in pairwise(known):
        if tokens <= more:
            return slower + (faster - slower) * (tokens - fewer) / (more - fewer)
    return known[-1][1]


def _points(pairs: Iterable[Sequence[float]]) -> tuple[Point, ...]:
    return tuple((float(tokens), float(rate)) for tokens, rate in pairs)
