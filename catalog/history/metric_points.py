"""Packs and unpacks the points of a job's curves. Pure: no database.

A packed value contains compressed columns. Each number keeps all of its bits, and an unmeasured column takes no space.
Unpacking reads only numbers and JSON, so it executes no code from the data (unlike pickle).
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise, repeat
from typing import Any, NamedTuple, TypeVar

Json = dict[str, Any]
VERSION = 1
HEAD = struct.Struct("<BBI")
"""Version, bit mask of the present OPTIONAL columns, number of points."""
OPTIONAL = ("token_accuracy", "learning_rate", "grad_norm", "num_tokens", "rewards")
NO_NUMBER = -(2**63)
FAST = 1
"""zlib level: higher levels take longer and save little."""


class Point(NamedTuple):
    """The measurements of one step."""

    kind: str
    """train or valid."""
    step: int
    seq: int
    """Number of the first event of the same write, so later points have greater numbers. 0 for points of versions that
    did not store it."""
    created_at: float
    loss: float
    token_accuracy: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    num_tokens: int | None = None
    rewards: Json | None = None
    """For preference training: chosen, rejected, margin, accuracy."""


def pack(points: Sequence[Point]) -> bytes:
    """Pack at least one point. All points have the same kind, which is not stored, and are sorted by step."""
    count = len(points)
    _, steps, seqs, times, losses, *optional = zip(*points, strict=True)
    measured = [any(value is not None for value in column) for column in optional]
    parts = [HEAD.pack(VERSION, sum(1 << place for place, is_there in enumerate(measured) if is_there), count)]
    parts += [_whole(_gaps(steps)), _whole(_gaps(seqs)), _real(times), _real(losses)]
    for name, column, is_there in zip(OPTIONAL, optional, measured, strict=True):
        if not is_there:
            continue
        if name == "rewards":
            parts.append(json.dumps(column, allow_nan=False, separators=(",", ":")).encode())
        elif name == "num_tokens":
            parts.append(_whole([NO_NUMBER if value is None else value for value in column]))
        else:
            parts.append(_real([math.nan if value is None else value for value in column]))
    return zlib.compress(b"".join(parts), FAST)


def unpack(kind: str, packed: bytes) -> list[Point]:
    content = zlib.decompress(packed)
    version, measured, count = HEAD.unpack_from(content)
    assert version == VERSION, version
    place = HEAD.size

    def column(letter: str) -> tuple[Any, ...]:
        nonlocal place
        values = struct.unpack_from(f"<{count}{letter}", content, place)
        place += 8 * count
        return values

    columns: list[Iterable[Any]] = [accumulate(column("q")), accumulate(column("q")), column("d"), column("d")]
    for bit, name in enumerate(OPTIONAL):
        if not measured & (1 << bit):
            columns.append(repeat(None, count))
        elif name == "rewards":
            columns.append(json.loads(content[place:]))
        elif name == "num_tokens":
            columns.append([None if value == NO_NUMBER else value for value in column("q")])
        else:
            columns.append([None if math.isnan(value) else value for value in column("d")])
    return list(map(Point, repeat(kind, count), *columns))


def _gaps(values: Sequence[int]) -> list[int]:
    """Return the first value and the differences. These are nearly always equal, so they compress to almost nothing."""
    return [values[0], *(after - before for before, after in pairwise(values))]


def _whole(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _real(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


T = TypeVar("T")


def thin(points: Sequence[T], max_points: int, *, value: Callable[[T], float]) -> list[T]:
    """Return at most `max_points` of the points (but at least 4), in their order.

    The first and the last are kept. The rest are split into equal buckets, and the lowest and highest point of each
    are kept.
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
