"""Chooses the parameters of a trial: a pure function of the sweep's parameters, its seed and the trial's number.

A trial therefore always has the same parameters, no matter when and by which process it is created.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from catalog.search.fields import Kind, kind_of
from catalog.search.spec import Parameter

DIGITS = 6
"""Significant digits of a sampled number: enough for a search, and few enough to read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """The possible values of a field."""

    path: str
    kind: Kind
    values: tuple[Any, ...] | None = None
    """None: numbers of this kind from low to high."""
    low: float = 0.0
    high: float = 0.0
    scale: Literal["linear", "log"] = "linear"
    points: int | None = None


def dimension(path: str, parameter: Parameter) -> Dimension:
    if parameter.values is not None:
        return Dimension(path=path, kind=kind_of(path), values=tuple(parameter.values))
    assert parameter.min is not None
    assert parameter.max is not None
    return Dimension(
        path=path,
        kind=kind_of(path),
        low=parameter.min,
        high=parameter.max,
        scale=parameter.scale,
        points=parameter.points,
    )


def grid_values(dimension: Dimension) -> tuple[Any, ...]:
    """Return the distinct values in order. For whole numbers there may be fewer than `points`."""
    if dimension.values is not None:
        return dimension.values
    assert dimension.points is not None
    parts = (step / (dimension.points - 1) for step in range(dimension.points))
    return tuple(dict.fromkeys(_between(dimension, part) for part in parts))


def grid_size(dimensions: Sequence[Dimension]) -> int:
    return math.prod(len(grid_values(dimension)) for dimension in dimensions)


def grid_point(dimensions: Sequence[Dimension], number: int) -> dict[str, Any]:
    """Return the combination with this number, from 0. The last parameter changes fastest."""
    point: dict[str, Any] = {}
    for each in reversed(dimensions):
        values = grid_values(each)
        number, index = divmod(number, len(values))
        point[each.path] = values[index]
    assert number == 0, "the grid has no such number"
    return {each.path: point[each.path] for each in dimensions}


def random_point(dimensions: Sequence[Dimension], *, seed: int, number: int) -> dict[str, Any]:
    """Return the parameters of a trial. The value of a parameter does not depend on the other parameters."""
    return {each.path: _drawn(each, _uniform(seed, number, each.path)) for each in dimensions}


def _uniform(seed: int, number: int, path: str) -> float:
    """Return a number from 0 to below 1 with 53 random bits."""
    digest = hashlib.sha256(f"{seed}/{number}/{path}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _drawn(dimension: Dimension, part: float) -> Any:
    if dimension.values is not None:
        return dimension.values[int(part * len(dimension.values))]
    if dimension.kind != "integer":
        return _between(dimension, part)
    # Each whole number gets the interval of the scale that is nearest to it.
    low, high = dimension.low - 0.5, dimension.high + 0.5
    drawn = _on_scale(low, high, part, dimension.scale)
    return int(min(dimension.high, max(dimension.low, math.floor(drawn + 0.5))))


def _between(dimension: Dimension, part: float) -> Any:
    """Return the number at `part` of the range: 0 is low, 1 is high."""
    number = _on_scale(dimension.low, dimension.high, part, dimension.scale)
    if dimension.kind == "integer":
        return math.floor(number + 0.5)
    return min(dimension.high, max(dimension.low, float(f"{number:.{DIGITS}g}")))


def _on_scale(low: float, high: float, part: float, scale: Literal["linear", "log"]) -> float:
    if scale == "linear":
        return low + part * (high - low)
    return math.exp(math.log(low) + part * (math.log(high) - math.log(low)))
