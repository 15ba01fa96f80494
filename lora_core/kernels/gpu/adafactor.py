# pyright: basic, reportIndexIssue=false, reportMissingImports=false
"""Adafactor (lora_core/adapter/adafactor.py) over the matrices of many adapters in a few launches, as Triton kernels.

The sums of a matrix run over tiles of fixed size in a fixed order, so their bits depend neither on the number of
multiprocessors nor on other matrices. Shape suffixes: N rows and K columns of a tile, L elements of a chunk of state,
E elements that a program reads at once.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import triton
import triton.language as tl

from lora_core.kernels.gpu.adafactor_table import CHUNK, NUM_WORDS, WORD, AdafactorStep, tables_of
from lora_core.runtime.transfers import upload

MANY = 1024
"""Sums that a program adds up at once. Another number changes their bits."""
NUM_SCALES = 3
"""For each matrix: the root mean square of p, the mean of the rows' state, and the factor of the update."""
EPS = torch.finfo(torch.float32).eps
"""epsilon1, as in lora_core/adapter/adafactor.py."""
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""Each operation is rounded, and divisions and roots are exact, so ranks on unlike GPUs take the same step."""

TILES_OF_KIND = ["tiles"]
"""Tiles of a kind start anywhere in the table of tiles. A kernel is compiled once for all of these addresses."""


def adafactor(steps: Sequence[AdafactorStep]) -> None:
    """Take all steps."""
    for launch in adafactor_launches(steps):
        launch()


def adafactor_launches(steps: Sequence[AdafactorStep]) -> list[Callable[[], None]]:
    """Upload all steps in one copy.

    Returns six launches for matrices of one kind, and three more for each other kind. Launches before the last ones
    change the state, so a step is complete only after all of them. Raises torch.OutOfMemoryError.
    """
    device, tables = steps[0].p.device, tables_of(steps)
    partials = torch.empty(tables.num_partials, device=device)
    squares = torch.empty(tables.num_squares, dtype=torch.float64, device=device)
    scales = torch.empty(len(tables.entries) * NUM_SCALES, dtype=torch.float64, device=device)
    entries = tables.entries.view(np.int64).reshape(-1, NUM_WORDS)
    table, tiles, chunks = upload([entries, tables.tiles, tables.chunks], device)
    of_kinds = [(tiles[kind.span], kind.has_copy, kind.constants | OPTIONS) for kind in tables.kinds]
    by_chunk, by_matrix = (len(chunks),), (len(entries),)
    return [
        *(partial(_squares[(len(own),)], table, own, partials, squares, **options) for own, _, options in of_kinds),
        partial(_mean_squares[by_chunk], table, chunks, partials, CHUNK=CHUNK, **OPTIONS),
        partial(_scales[by_matrix], table, squares, scales, MANY=MANY, **OPTIONS),
        *(
            partial(_update_squares[(len(own),)], table, own, squares, scales, **options)
            for own, _, options in of_kinds
        ),
        partial(_factors[by_matrix], table, squares, scales, MANY=MANY, **OPTIONS),
        *(
            partial(_update[(len(own),)], table, own, scales, HAS_COPY=has_copy, **options)
            for own, has_copy, options in of_kinds
        ),
    ]


_P, _G, _V, _COMPUTE = (tl.constexpr(WORD[name]) for name in ("p", "g", "v", "compute"))
_ROWS, _COLUMNS, _IS_VECTOR = (tl.constexpr(WORD[name]) for name in ("rows", "columns", "is_vector"))
_TILE_ROWS, _TILE_COLUMNS = tl.constexpr(WORD["tile_rows"]), tl.constexpr(WORD["tile_columns"])
_FIRST_TILE, _FIRST_CHUNK = tl.constexpr(WORD["first_tile"]), tl.constexpr(WORD["first_chunk"])
_PARTIALS, _SQUARES = tl.constexpr(WORD["partials"]), tl.constexpr(WORD["squares"])
_CLIP, _DECAY, _NEWEST = (tl.constexpr(WORD[name]) for name in ("clip", "decay", "newest"))
_THRESHOLD, _FLOOR, _MOVE = (tl.constexpr(WORD[name]) for name in ("threshold", "floor", "move"))
_NUM_WORDS, _NUM_SCALES, _EPS = tl.constexpr(NUM_WORDS), tl.constexpr(NUM_SCALES), tl.constexpr(EPS)


@triton.jit
def _entry(table, matrices):
    return table + tl.load(matrices + tl.program_id(0)).to(tl.int64) * _NUM_WORDS


@triton.jit
def _vector(entry, POSITION: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(entry + POSITION).to(tl.pointer_type(DTYPE))


@triton.jit
def _number(entry, POSITION: tl.constexpr):
    """Read a float64."""
    return tl.load(entry + POSITION).to(tl.float64, bitcast=True)


@triton.jit
def _tile(entry, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the first row and column of the program's tile, the position of its first element, the positions of all
    relative to that, and which of its rows, columns and elements exist."""
    tile = tl.program_id(0) - tl.load(entry + _FIRST_TILE)
    tile_columns, columns = tl.load(entry + _TILE_COLUMNS), tl.load(entry + _COLUMNS)
    if ALIGNED:
        columns = tl.multiple_of(columns, 4)
    row, column = tile // tile_columns * ROWS, tile % tile_columns * COLUMNS
    rows_N, columns_K = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    has_N = rows_N < tl.minimum(tl.load(entry + _ROWS) - row, ROWS).to(tl.int32)
    left = tl.minimum(columns - column, COLUMNS).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 4)
    has_K = columns_K < left
    width = columns.to(tl.int32)
    if ALIGNED:
        width = tl.multiple_of(width, 4)
    places_NK = rows_N[:, None] * width + columns_K[None, :]
    return row, column, row * columns + column, places_NK, has_N, has_K, has_N[:, None] & has_K[None, :]


@triton.jit
def _elements(vector, start, places_NK, has_NK, VECTOR_BYTES: tl.constexpr, ALIGNED: tl.constexpr):
    """Read a tile of a matrix, and return its addresses too."""
    first = vector + start
    if ALIGNED:
        first = tl.multiple_of(first, VECTOR_BYTES)
    return first + places_NK, tl.load(first + places_NK, mask=has_NK, other=0.0)


@triton.jit(do_not_specialize_on_alignment=TILES_OF_KIND)
def _squares(table, tiles, partials, squares, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Add up the squares of a tile: those of the gradient by row and by column, and those of p."""
    entry = _entry(table, tiles)
    row, column, start, places_NK, has_N, has_K, has_NK = _tile(entry, ROWS, COLUMNS, ALIGNED)
    tile = tl.program_id(0) - tl.load(entry + _FIRST_TILE)
    rows, columns, is_matrix = tl.load(entry + _ROWS), tl.load(entry + _COLUMNS), 1 - tl.load(entry + _IS_VECTOR)
    tile_columns = tl.load(entry + _TILE_COLUMNS)
    _, g_NK = _elements(_vector(entry, _G, tl.float32), start, places_NK, has_NK, 16, ALIGNED)
    g_NK *= _number(entry, _CLIP).to(tl.float32)
    of_rows = partials + tl.load(entry + _PARTIALS)
    of_columns = of_rows + tile_columns * rows
    rows_N, columns_K = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    of_rows += tile % tile_columns * rows + row
    of_columns += tile // tile_columns * columns + column
    tl.store(of_rows + rows_N, tl.sum(g_NK * g_NK, 1), mask=has_N & (rows_N < is_matrix * ROWS))
    tl.store(of_columns + columns_K, tl.sum(g_NK * g_NK, 0), mask=has_K & (columns_K < is_matrix * COLUMNS))
    _, p_NK = _elements(_vector(entry, _P, tl.float32), start, places_NK, has_NK, 16, ALIGNED)
    tl.store(squares + tl.load(entry + _SQUARES) + tile, _square_sum(p_NK))


@triton.jit
def _square_sum(x_NK):
    wide_NK = x_NK.to(tl.float64)
    return tl.sum(tl.sum(wide_NK * wide_NK, 1), 0)


@triton.jit
def _mean_squares(table, chunks, partials, CHUNK: tl.constexpr):
    """Move a chunk of the state toward the mean squares of rows and columns, or toward the squares of a vector."""
    entry = _entry(table, chunks)
    rows, columns, is_vector = tl.load(entry + _ROWS), tl.load(entry + _COLUMNS), tl.load(entry + _IS_VECTOR)
    tile_rows, tile_columns = tl.load(entry + _TILE_ROWS), tl.load(entry + _TILE_COLUMNS)
    lines_L = (tl.program_id(0) - tl.load(entry + _FIRST_CHUNK)) * CHUNK + tl.arange(0, CHUNK)
    is_row_L = lines_L < rows
    has_L = lines_L < columns + (1 - is_vector) * rows
    g_L = tl.load(_vector(entry, _G, tl.float32) + lines_L, mask=lines_L < is_vector * columns, other=0.0)
    g_L *= _number(entry, _CLIP).to(tl.float32)
    of_lines = partials + tl.load(entry + _PARTIALS)
    places_L = tl.where(is_row_L, lines_L, tile_columns * rows + lines_L - rows)
    stride_L = tl.where(is_row_L, rows, columns)
    counts_L = (1 - is_vector) * tl.where(has_L, tl.where(is_row_L, tile_columns, tile_rows), 0)
    total_L = tl.zeros((CHUNK,), tl.float64)
    for part in range(0, tl.max(counts_L).to(tl.int32)):
        total_L += tl.load(of_lines + places_L + part * stride_L, mask=part < counts_L, other=0.0).to(tl.float64)
    means_L = (total_L / tl.where(is_row_L, columns, rows).to(tl.float64)).to(tl.float32)
    means_L = tl.where(is_vector != 0, g_L * g_L, means_L)
    state = _vector(entry, _V, tl.float32) + lines_L
    v_L = tl.load(state, mask=has_L, other=0.0)
    tl.store(state, v_L + _number(entry, _NEWEST).to(tl.float32) * (means_L - v_L), mask=has_L)


@triton.jit
def _sum(vector, count, MANY: tl.constexpr):
    """Return the sum of a vector, fp64."""
    total_E = tl.zeros((MANY,), tl.float64)
    for start in range(0, count, MANY):
        places_E = start + tl.arange(0, MANY)
        total_E += tl.load(vector + places_E, mask=places_E < count, other=0.0).to(tl.float64)
    return tl.sum(total_E, 0)


@triton.jit
def _root_mean_square(entry, squares, MANY: tl.constexpr):
    """Return the root mean square of a matrix from the sums of its tiles."""
    num_tiles = (tl.load(entry + _TILE_ROWS) * tl.load(entry + _TILE_COLUMNS)).to(tl.int32)
    count = (tl.load(entry + _ROWS) * tl.load(entry + _COLUMNS)).to(tl.float64)
    return tl.sqrt(_sum(squares + tl.load(entry + _SQUARES), num_tiles, MANY) / count)


@triton.jit
def _scales(table, squares, scales, MANY: tl.constexpr):
    """Compute the root mean square of p, and the mean of the state of the rows."""
    entry, own = table + tl.program_id(0) * _NUM_WORDS, scales + tl.program_id(0) * _NUM_SCALES
    size = tl.maximum(_root_mean_square(entry, squares, MANY), _number(entry, _FLOOR))
    rows = tl.load(entry + _ROWS).to(tl.int32)
    mean = _sum(_vector(entry, _V, tl.float32), rows, MANY) / rows.to(tl.float64)
    tl.store(own, size)
    tl.store(own + 1, tl.maximum(mean, _EPS))


@triton.jit
def _updates(entry, scale, start, row, column, places_NK, has_N, has_K, has_NK, ALIGNED: tl.constexpr):
    """Return the gradient divided by the root of its mean squares, and the addresses of the gradient."""
    rows_N, columns_K = tl.arange(0, places_NK.shape[0]), tl.arange(0, places_NK.shape[1])
    is_vector = tl.load(entry + _IS_VECTOR)
    state = _vector(entry, _V, tl.float32)
    v_N = tl.load(state + row + rows_N, mask=has_N, other=0.0)
    v_N = tl.where(is_vector != 0, 1.0, tl.div_rn(v_N, tl.load(scale + 1).to(tl.float32) + tl.zeros_like(v_N)))
    of_columns = state + (1 - is_vector) * tl.load(entry + _ROWS) + column
    v_K = tl.load(of_columns + columns_K, mask=has_K, other=0.0)
    root_NK = tl.sqrt_rn(tl.maximum(v_N[:, None] * v_K[None, :], _EPS * _EPS))
    g, g_NK = _elements(_vector(entry, _G, tl.float32), start, places_NK, has_NK, 16, ALIGNED)
    return g, tl.div_rn(g_NK * _number(entry, _CLIP).to(tl.float32), root_NK)


@triton.jit(do_not_specialize_on_alignment=TILES_OF_KIND)
def _update_squares(table, tiles, squares, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Add up the squares of the updates of a tile."""
    entry = _entry(table, tiles)
    scale = scales + tl.load(tiles + tl.program_id(0)) * _NUM_SCALES
    row, column, start, places_NK, has_N, has_K, has_NK = _tile(entry, ROWS, COLUMNS, ALIGNED)
    _, updates_NK = _updates(entry, scale, start, row, column, places_NK, has_N, has_K, has_NK, ALIGNED)
    tile = tl.program_id(0) - tl.load(entry + _FIRST_TILE)
    tl.store(squares + tl.load(entry + _SQUARES) + tile, _square_sum(updates_NK))


@triton.jit
def _factors(table, squares, scales, MANY: tl.constexpr):
    """Compute the factor of a matrix's updates."""
    entry, own = table + tl.program_id(0) * _NUM_WORDS, scales + tl.program_id(0) * _NUM_SCALES
    excess = tl.maximum(_root_mean_square(entry, squares, MANY) / _number(entry, _THRESHOLD), 1.0)
    tl.store(own + 2, tl.load(own) * _number(entry, _MOVE) / excess)


@triton.jit(do_not_specialize_on_alignment=TILES_OF_KIND)
def _update(
    table,
    tiles,
    scales,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_COPY: tl.constexpr,
):
    """Apply the updates of a tile, and zero its gradient."""
    entry = _entry(table, tiles)
    scale = scales + tl.load(tiles + tl.program_id(0)) * _NUM_SCALES
    row, column, start, places_NK, has_N, has_K, has_NK = _tile(entry, ROWS, COLUMNS, ALIGNED)
    g, updates_NK = _updates(entry, scale, start, row, column, places_NK, has_N, has_K, has_NK, ALIGNED)
    p, p_NK = _elements(_vector(entry, _P, tl.float32), start, places_NK, has_NK, 16, ALIGNED)
    p_NK = p_NK * _number(entry, _DECAY).to(tl.float32) - updates_NK * tl.load(scale + 2).to(tl.float32)
    tl.store(p, p_NK, mask=has_NK)
    tl.store(g, tl.zeros_like(p_NK), mask=has_NK)
    if HAS_COPY:
        copy = _vector(entry, _COMPUTE, tl.bfloat16) + start
        if ALIGNED:
            copy = tl.multiple_of(copy, 8)
        tl.store(copy + places_NK, p_NK.to(tl.bfloat16), mask=has_NK)
