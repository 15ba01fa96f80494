# pyright: basic
"""The tables that Triton kernels read: which rows belong to which segment, and where the adapter of a segment is.

A host builds the tables of a pass at once and uploads them in one copy. This module does not import Triton. Linears
with the same input (siblings) share tables. Shape suffixes: S segments of a pass, G tiles, P spans, J joins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
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
    """Return the tiles, spans and joins of segments of one class. There is at least one member."""
    fields = [(one.entry, one.start, one.stop, one.sibling, one.segment) for one in members]
    entry_P, start_P, stop_P, sibling_P, segment_P = np.array(fields, np.int64).T
    hidden_P = np.cumsum(stop_P - start_P) - (stop_P - start_P)
    of_G, after_G, rows_G = _tiled(start_P, stop_P)
    tiles = (entry_P[of_G], start_P[of_G] + after_G, rows_G, hidden_P[of_G] + after_G, after_G, sibling_P[of_G])
    spans = np.stack((entry_P, start_P, stop_P, hidden_P, sibling_P), axis=1)
    order_P = np.lexsort((sibling_P, segment_P))
    return np.stack(tiles, axis=1), spans, _joins(spans[order_P], segment_P[order_P])


def _joins(spans: np.ndarray, segment_P: np.ndarray) -> np.ndarray:
    """Return the joins of spans in the order of their segments."""
    _, first_S, siblings_S = np.unique(segment_P, return_index=True, return_counts=True)
    number_P = np.arange(len(spans)) - np.repeat(first_S, siblings_S)
    places = np.zeros((len(first_S), MOST_SIBLINGS, 2), np.int64)
    places[np.repeat(np.arange(len(first_S)), siblings_S), number_P] = spans[:, [0, 3]]
    start_S, stop_S = spans[first_S, 1], spans[first_S, 2]
    of_J, after_J, rows_J = _tiled(start_S, stop_S)
    places = places[of_J]
    places[:, :, 1] += np.where(np.arange(MOST_SIBLINGS) < siblings_S[of_J, None], after_J[:, None], 0)
    joins = np.stack((start_S[of_J] + after_J, rows_J, after_J, siblings_S[of_J]), axis=1)
    return np.concatenate((joins, places.reshape(len(joins), -1)), axis=1)


def _tiled(start_P: np.ndarray, stop_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tiles of rows [start, stop) in their order: the index of the rows, the tile's first row minus their
    first, and its number of rows."""
    rows_P = stop_P - start_P
    tiles_P = -(-rows_P // TILE_ROWS)
    of_G = np.repeat(np.arange(len(tiles_P)), tiles_P)
    after_G = TILE_ROWS * (np.arange(len(of_G)) - np.repeat(np.cumsum(tiles_P) - tiles_P, tiles_P))
    return of_G, after_G, np.minimum(TILE_ROWS, rows_P[of_G] - after_G)


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
