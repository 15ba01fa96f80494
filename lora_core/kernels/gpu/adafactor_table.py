# pyright: basic
"""The tables of Adafactor steps that adafactor.py reads. This module does not import Triton.

A matrix is divided into tiles, and its state (mean squares of rows, then of columns) into chunks. Tiles depend on the
shape of the matrix alone, so that the bits of its sums don't depend on other matrices. M is the number of matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

Numbers = np.ndarray[Any, Any]

MATRIX = np.dtype(
    [(name, "<i8") for name in ("p", "g", "v", "compute")]
    + [(name, "<i8") for name in ("rows", "columns", "is_vector", "tile_rows", "tile_columns")]
    + [(name, "<i8") for name in ("first_tile", "first_chunk", "partials", "squares")]
    + [(name, "<f8") for name in ("clip", "decay", "newest", "threshold", "floor", "move")]
)
"""One matrix, or one vector as a matrix with one row.

`p` to `compute` are addresses. `tile_rows` is the number of tiles above each other, and `tile_columns` that of tiles
side by side. `partials` and `squares` are positions in memory of all matrices: of the sums of squares of rows and of
columns by tile, and of the sums over all elements of each tile. `newest` is the weight of the newest squares, and
`move` the learning rate relative to the root mean square of the matrix.
"""
NUM_WORDS = MATRIX.itemsize // 8
WORD = {name: position for position, name in enumerate(MATRIX.names or ())}
TILES = {False: (16, 128), True: (128, 16)}
"""Rows and columns of a tile, by whether the matrix has more rows than columns."""
CHUNK = 256
"""Elements of the state of one program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixLayout:
    """The matrices of one flat adapter, each field [M]: position in p, shape, and position of its state in v."""

    starts: Numbers
    rows: Numbers
    columns: Numbers
    memory: Numbers
    is_vector: Numbers

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]], starts: Sequence[int], memory: Sequence[int]) -> "MatrixLayout":
        """`shapes` are those of matrices and vectors."""
        pairs = np.array([(1, *shape) if len(shape) == 1 else shape for shape in shapes], np.int64).reshape(-1, 2)
        return cls(
            starts=np.array(starts, np.int64),
            rows=pairs[:, 0],
            columns=pairs[:, 1],
            memory=np.array(memory, np.int64),
            is_vector=np.array([len(shape) == 1 for shape in shapes]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdafactorStep:
    """One Adafactor step of flat fp32 vectors p and g [N], and of the state v. All are updated in place.

    Attributes:
        compute: bf16 copy of p, or None if passes read p.
        clip: Factor on the gradient, which is zeroed afterwards.
        step: Number of the step, from 1.
        plus: Elements of matrices with the learning rate `plus_rate` (LoRA+). The others have `rate`.
    """

    layout: MatrixLayout
    p: Tensor
    g: Tensor
    v: Tensor
    compute: Tensor | None
    clip: float
    beta2_decay: float
    clip_threshold: float
    scale_floor: float
    weight_decay: float
    step: int
    rate: float
    plus: slice
    plus_rate: float

    def entries(self) -> Numbers:
        """Return MATRIX [M] without the fields that depend on other steps, which `tables_of` sets."""
        layout = self.layout
        entries = np.zeros(len(layout.starts), MATRIX)
        for name, vector, places in (
            ("p", self.p, layout.starts),
            ("g", self.g, layout.starts),
            ("v", self.v, layout.memory),
            ("compute", self.compute, layout.starts),
        ):
            entries[name] = 0 if vector is None else address_of(vector) + places * vector.itemsize
        heights, widths = _tile_sizes(layout.rows, layout.columns)
        rates = np.where(
            (layout.starts >= self.plus.start) & (layout.starts < self.plus.stop), self.plus_rate, self.rate
        )
        fields = {
            "rows": layout.rows,
            "columns": layout.columns,
            "is_vector": layout.is_vector,
            "tile_rows": -(-layout.rows // heights),
            "tile_columns": -(-layout.columns // widths),
            "clip": self.clip,
            "decay": 1 - rates * self.weight_decay,
            "newest": self.step**self.beta2_decay,
            "threshold": self.clip_threshold,
            "floor": self.scale_floor,
            "move": np.minimum(rates, self.step**-0.5),
        }
        for name, numbers in fields.items():
            entries[name] = numbers
        return entries


@dataclass(frozen=True, kw_only=True, slots=True)
class TileKind:
    """Tiles that one launch computes. `span` are the positions of their matrices in `MatrixTables.tiles`."""

    is_tall: bool
    is_aligned: bool
    has_copy: bool
    span: slice

    @property
    def constants(self) -> dict[str, Any]:
        rows, columns = TILES[self.is_tall]
        return {"ROWS": rows, "COLUMNS": columns, "ALIGNED": self.is_aligned}


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixTables:
    """The tables of all matrices of a tick's steps.

    Attributes:
        entries: MATRIX [M].
        tiles, chunks: The matrix of each tile and of each chunk of state, int32.
        kinds: The launches over tiles.
        num_partials, num_squares: Sizes of the memory of `partials` and of `squares`.
    """

    entries: Numbers
    tiles: Numbers
    chunks: Numbers
    kinds: tuple[TileKind, ...]
    num_partials: int
    num_squares: int


def tables_of(steps: Sequence[AdafactorStep]) -> MatrixTables:
    """Return the tables of the steps, whose order does not change the result of any."""
    entries = np.concatenate([step.entries() for step in steps])
    rows, columns, is_vector = entries["rows"], entries["columns"], entries["is_vector"] == 1
    num_tiles = entries["tile_rows"] * entries["tile_columns"]
    sums = np.where(is_vector, 0, entries["tile_columns"] * rows + entries["tile_rows"] * columns)
    entries["partials"], entries["squares"] = _starts(sums), _starts(num_tiles)
    num_chunks = -(-np.where(is_vector, columns, rows + columns) // CHUNK)
    entries["first_chunk"] = _starts(num_chunks)
    tiles: list[Numbers] = []
    kinds: list[TileKind] = []
    start = 0
    kind_of_each = np.stack([rows > columns, _are_aligned(entries), entries["compute"] != 0], axis=1)
    for kind in np.unique(kind_of_each, axis=0):
        (matrices,) = np.nonzero((kind_of_each == kind).all(axis=1))
        entries["first_tile"][matrices] = _starts(num_tiles[matrices])
        tiles.append(np.repeat(matrices, num_tiles[matrices]).astype(np.int32))
        is_tall, is_aligned, has_copy = map(bool, kind)
        span = slice(start, start + len(tiles[-1]))
        kinds.append(TileKind(is_tall=is_tall, is_aligned=is_aligned, has_copy=has_copy, span=span))
        start = span.stop
    return MatrixTables(
        entries=entries,
        tiles=np.concatenate(tiles),
        chunks=np.repeat(np.arange(len(entries), dtype=np.int32), num_chunks),
        kinds=tuple(kinds),
        num_partials=int(sums.sum()),
        num_squares=int(num_tiles.sum()),
    )


def address_of(vector: Tensor) -> int:
    """Return the address of the first element. Tests replace this function, because fake tensors have no address."""
    return vector.data_ptr()


def _tile_sizes(rows: Numbers, columns: Numbers) -> tuple[Numbers, Numbers]:
    """Return the rows and columns of a tile of each matrix."""
    wide, tall = TILES[False], TILES[True]
    return np.where(rows > columns, tall[0], wide[0]), np.where(rows > columns, tall[1], wide[1])


def _are_aligned(entries: Numbers) -> Numbers:
    """Return for each matrix whether four elements side by side can be loaded at once."""
    is_aligned = entries["columns"] % 4 == 0
    for name, num_bytes in (("p", 16), ("g", 16), ("compute", 8)):
        is_aligned &= entries[name] % num_bytes == 0
    return is_aligned


def _starts(sizes: Numbers) -> Numbers:
    return np.cumsum(sizes) - sizes
