# pyright: basic
"""The tables that Triton kernels read: which rows belong to which segment, and where the adapter of a segment is.

A host builds the tables of a pass at once and uploads them in one copy. This module does not import Triton. Shape
suffixes: S segments of a pass, G tiles, P spans.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
WORD = {name: int(offset) // 8 for name, (_, offset, *_) in (ENTRY.fields or {}).items()}
"""Position of each field in an entry, in words of eight bytes."""
TILE_WORDS = 5
"""A tile is (segment, first row, number of rows, first row in h, first row minus that of the segment)."""
SPAN_WORDS = 4
"""A span is (segment, first row, last row + 1, first row in h)."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class TileClass:
    """The variant of the kernels for a segment. It depends on the segment alone, and so do the segment's bits."""

    width: int
    is_aligned: bool
    has_dropout: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TileGroup:
    """The tiles int64 [G, 5] and spans int64 [P, 4] of the segments of one class. They have `num_rows` rows in all."""

    kind: TileClass
    tiles: Tensor
    spans: Tensor
    num_rows: int


def class_of(rank: int, *, has_dropout: bool) -> TileClass:
    width = next(width for width in WIDTHS if rank <= width)
    return TileClass(width=width, is_aligned=rank % ALIGNED_RANK == 0, has_dropout=has_dropout)


def tiles_and_spans(segments: Sequence[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tiles and spans of segments, each given as (segment, first row, last row + 1)."""
    tiles: list[tuple[int, ...]] = []
    spans: list[tuple[int, ...]] = []
    hidden = 0
    for segment, start, stop in segments:
        spans.append((segment, start, stop, hidden))
        for first in range(start, stop, TILE_ROWS):
            tiles.append((segment, first, min(TILE_ROWS, stop - first), hidden + first - start, first - start))
        hidden += stop - start
    return np.array(tiles, np.int64).reshape(-1, TILE_WORDS), np.array(spans, np.int64).reshape(-1, SPAN_WORDS)
