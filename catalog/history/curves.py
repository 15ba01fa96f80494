"""Down-sampling of curves that keeps what a reader looks for: the ends and the peaks. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def thin(points: Sequence[T], max_points: int, *, value: Callable[[T], float]) -> list[T]:
    """At most `max_points` (4 at least) of the points, in their order.

    The first and the last are kept; the rest are cut into equal buckets, of each the lowest and the highest.
    """
    max_points = max(4, max_points)
    if len(points) <= max_points:
        return list(points)
    inner = range(1, len(points) - 1)
    num_buckets = (max_points - 2) // 2
    kept = {0, len(points) - 1}
    for i in range(num_buckets):
        bucket = inner[i * len(inner) // num_buckets : (i + 1) * len(inner) // num_buckets]
        kept.add(min(bucket, key=lambda j: value(points[j])))
        kept.add(max(bucket, key=lambda j: value(points[j])))
    return [points[i] for i in sorted(kept)]
