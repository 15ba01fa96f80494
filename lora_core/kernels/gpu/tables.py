# pyright: basic
"""The tables that Triton kernels read: which rows belong to which segment, and where the adapter of a segment is.

A host builds the tables of a pass at once and uploads them in one copy. This module does not import Triton. Linears
with the same input (siblings) share tables. Shape suffixes: S segments of a pass, G tiles, P spans, J joins.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
from torch import Tensor

TILE_ROWS = 64
"""Rows of a tile: the smallest number that the matrix units of compute capability 9.0 multiply at once."""
WIDTHS = (16, 32, 64, 128)
"""Widths of h. A rank is padded in registers to the next one."""
ALIGNED_RANK = 8
"""Ranks that are multiples of it have 16-byte rows in B, which one instruction loads."""
FEATURE_MULTIPLE = 16
"""Input and output features are multiples of it: 16 elements use one block of random numbers."""
ENTRY = np.dtype(
    [
        ("a", "<i8"),
        ("b", "<i8"),
        ("grad_a", "<i8"),
        ("grad_b", "<i8"),
        ("rank", "<i8"),
        ("trained", "<i8"),
        ("scale", "<f8"),
        ("threshold", "<i8"),
        ("keep_factor", "<f8"),
        ("unused", "<i8"),
        ("key", "<u8", 2),
    ]
)
"""One segment in one linear. `a`, `b` and their gradients are addresses. `rank` is that of the weights, `trained` that
of the gradients. A random number below `threshold`, of 65,536, keeps an element, which `keep_factor` multiplies. `key`
is that of the random numbers. The size is a multiple of 16 bytes."""
NUM_WORDS = ENTRY.itemsize // 8
NUM_ADDRESSES = 4
"""An entry begins with this number of addresses."""
WORD = {name: int(offset) // 8 for name, (_, offset, *_) in (ENTRY.fields or {}).items()}
"""Position of each field in an entry, in words of eight bytes."""
TILE_WORDS = 6
"""A tile is (entry, first row, number of rows, first row in h, first row minus that of the segment, sibling)."""
SPAN_WORDS = 5
"""A span is (entry, first row, last row + 1, first row in h, sibling)."""
MOST_SIBLINGS = 3
"""Maximum number of linears that share tables."""
JOIN_WORDS = 4 + 2 * MOST_SIBLINGS
"""A join is a tile of all siblings: (first row, number of rows, first row minus that of the segment, number of
siblings), and for each of them (entry, first row in h)."""


class TileClass(NamedTuple):
    """The variant of the kernels for a segment. It depends on the segment alone, and so do the segment's bits."""

    width: int
    is_aligned: bool
    has_dropout: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TileGroup:
    """The segments of one class in siblings: tiles int64 [G, 6], spans int64 [P, 5] and joins int64 [J, 10].

    They have `num_rows` rows in all, where a row counts once for each sibling. `launches` contains the prepared
    launches by kernel and widths.
    """

    kind: TileClass
    num_siblings: int
    tiles: Tensor
    spans: Tensor
    joins: Tensor
    num_tiles: int
    num_spans: int
    num_joins: int
    num_rows: int
    launches: dict[tuple[str | int, ...], Callable[..., None]] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """Rows [start, stop) of a segment in one of several siblings. `entry` is its place among the siblings' entries."""

    segment: int
    sibling: int
    entry: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@cache
def class_of(rank: int, *, has_dropout: bool) -> TileClass:
    width = next(width for width in WIDTHS if rank <= width)
    return TileClass(width=width, is_aligned=rank % ALIGNED_RANK == 0, has_dropout=has_dropout)


def tables_of(members: Sequence[Member]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tiles, spans and joins of segments of one class."""
    tiles: list[tuple[int, ...]] = []
    spans: list[tuple[int, ...]] = []
    hidden_of: dict[int, int] = {}  # by entry
    hidden = 0
    for member in members:
        hidden_of[member.entry] = hidden
        spans.append((member.entry, member.start, member.stop, hidden, member.sibling))
        for first, num_rows in _tiled(member):
            after = first - member.start
            tiles.append((member.entry, first, num_rows, hidden + after, after, member.sibling))
        hidden += member.num_rows
    return (
        np.array(tiles, np.int64).reshape(-1, TILE_WORDS),
        np.array(spans, np.int64).reshape(-1, SPAN_WORDS),
        _joins(members, hidden_of),
    )


def _joins(members: Sequence[Member], hidden_of: Mapping[int, int]) -> np.ndarray:
    joins: list[tuple[int, ...]] = []
    ordered = sorted(members, key=lambda member: (member.segment, member.sibling))
    for _, of_segment in groupby(ordered, lambda member: member.segment):
        siblings = list(of_segment)
        unused = (0, 0) * (MOST_SIBLINGS - len(siblings))
        for first, num_rows in _tiled(siblings[0]):
            after = first - siblings[0].start
            places = chain.from_iterable((member.entry, hidden_of[member.entry] + after) for member in siblings)
            joins.append((first, num_rows, after, len(siblings), *places, *unused))
    return np.array(joins, np.int64).reshape(-1, JOIN_WORDS)


def _tiled(member: Member) -> list[tuple[int, int]]:
    """Return (first row, number of rows) of each tile."""
    return [(first, min(TILE_ROWS, member.stop - first)) for first in range(member.start, member.stop, TILE_ROWS)]


def group_of(kind: TileClass, members: Sequence[Member], tables: Sequence[Tensor], *, num_siblings: int) -> TileGroup:
    """Return the group of members whose `tables_of` are on a device."""
    tiles, spans, joins = tables
    return TileGroup(
        kind=kind,
        num_siblings=num_siblings,
        tiles=tiles,
        spans=spans,
        joins=joins,
        num_tiles=len(tiles),
        num_spans=len(spans),
        num_joins=len(joins),
        num_rows=sum(member.num_rows for member in members),
    )
