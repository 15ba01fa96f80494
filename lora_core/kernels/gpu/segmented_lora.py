# pyright: basic, reportIndexIssue=false, reportMissingImports=false
"""LoRA over the segments of a pack as Triton kernels, forward and backward.

h = scale·d(x) Aᵀ and dh = scale·dy B are `_shrink`, y += h Bᵀ is `_expand`, dx += Σ d(dh A) is `_expand_sum`, and
dB += dyᵀ h and dA += dhᵀ d(x) are `_accumulate`, with d for dropout. Up to three linears with the same x (siblings)
share a launch, and Σ sums over them. A program reads the rows of one segment in a fixed order, in tiles whose size
doesn't depend on the pack. No sum uses atomic additions. So a job's bits don't depend on its packmates.

Shape suffixes: M rows of a tile, K or N features of a tile, W padded rank, T tokens, D input and O output features.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.gpu.random_numbers import random_numbers
from lora_core.kernels.gpu.tables import (
    JOIN_WORDS,
    MOST_SIBLINGS,
    NUM_WORDS,
    SPAN_WORDS,
    TILE_ROWS,
    TILE_WORDS,
    WIDTHS,
    WORD,
    TileClass,
    TileGroup,
)

ENTRY_WORDS = tl.constexpr(NUM_WORDS)
WORDS_OF_TILE = tl.constexpr(TILE_WORDS)
WORDS_OF_SPAN = tl.constexpr(SPAN_WORDS)
WORDS_OF_JOIN = tl.constexpr(JOIN_WORDS)
A, B = tl.constexpr(WORD["a"]), tl.constexpr(WORD["b"])
GRAD_A, GRAD_B = tl.constexpr(WORD["grad_a"]), tl.constexpr(WORD["grad_b"])
RANK, TRAINED = tl.constexpr(WORD["rank"]), tl.constexpr(WORD["trained"])
SCALE, FACTOR = tl.constexpr(WORD["scale"]), tl.constexpr(WORD["keep_factor"])
THRESHOLD, KEY = tl.constexpr(WORD["threshold"]), tl.constexpr(WORD["key"])
NUM_WARPS, NUM_STAGES = 4, 3
Kernel = Literal["shrink", "expand", "accumulate"]


def add_lora(outputs: Sequence[Tensor], x_TD: Tensor, entries: Tensor, group: TileGroup) -> Tensor:
    """Compute y += scale·d(x) Aᵀ Bᵀ in place for the group's rows. Returns h = scale·d(x) Aᵀ, [rows, W].

    `outputs` are the y [T, O] of each sibling, and `entries` those of all siblings. Rows must be contiguous.
    """
    h_tW = x_TD.new_empty(group.num_rows, group.kind.width)
    shrink(h_tW, [x_TD], entries, group, by_b=False)
    expand(outputs, h_tW, entries, group, by_b=True)
    return h_tW


def add_lora_gradients(
    dx_TD: Tensor | None, gradients: Sequence[Tensor], x_TD: Tensor, h_tW: Tensor, entries: Tensor, group: TileGroup
) -> None:
    """Accumulate dA and dB into the adapters, and the LoRA part of dx in place, unless `dx_TD` is None."""
    dh_tW = torch.empty_like(h_tW)
    shrink(dh_tW, gradients, entries, group, by_b=True)
    accumulate(gradients, h_tW, entries, group, by_b=True)
    accumulate([x_TD], dh_tW, entries, group, by_b=False)
    if dx_TD is not None:
        expand([dx_TD], dh_tW, entries, group, by_b=False)


def shrink(h_tW: Tensor, sources: Sequence[Tensor], entries: Tensor, group: TileGroup, *, by_b: bool) -> None:
    """Launch h = scale·d(x) Aᵀ, or h = scale·x B without dropout. All siblings share one x, or each has its own."""
    launch = _launch("shrink", sources, group, by_b)
    launch(*_padded(sources), h_tW, entries, group.tiles)


def expand(targets: Sequence[Tensor], h_tW: Tensor, entries: Tensor, group: TileGroup, *, by_b: bool) -> None:
    """Launch y += h Bᵀ for the y of each sibling, or y += Σ d(h A) over all siblings for one y."""
    launch = _launch("expand", targets, group, by_b)
    if by_b:
        launch(h_tW, *_padded(targets), entries, group.tiles)
    else:
        launch(h_tW, *targets, entries, group.joins)


def accumulate(sources: Sequence[Tensor], h_tW: Tensor, entries: Tensor, group: TileGroup, *, by_b: bool) -> None:
    """Launch dB += xᵀ h for the x of each sibling, or dA += hᵀ d(x) for one x."""
    launch = _launch("accumulate", sources, group, by_b)
    launch(*_padded(sources), h_tW, entries, group.spans)


def _padded(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return MOST_SIBLINGS tensors. A kernel doesn't read the additional ones."""
    return [*tensors, *[tensors[0]] * (MOST_SIBLINGS - len(tensors))]


def _launch(kernel: Kernel, tensors: Sequence[Tensor], group: TileGroup, by_b: bool) -> Callable[..., None]:
    """Return the kernel with its grid, widths and constants. They are equal for all layers of a pass with one group."""
    if len(tensors) == 1:  # most linears, and host time counts: each launch comes here
        key = kernel, by_b, tensors[0].size(1)
    else:
        key = kernel, by_b, *(tensor.size(1) for tensor in tensors)
    launch = group.launches.get(key)
    if launch is None:
        launch = group.launches[key] = _prepared(kernel, [tensor.size(1) for tensor in tensors], group, by_b)
    return launch


def _prepared(kernel: Kernel, widths: Sequence[int], group: TileGroup, by_b: bool) -> Callable[..., None]:
    constants = CONSTANTS[kernel](group.kind, by_b=by_b, num_siblings=len(widths))
    padded = zip(("width0", "width1", "width2"), [*widths, *[widths[0]] * (MOST_SIBLINGS - len(widths))], strict=True)
    if kernel == "shrink":
        return partial(_shrink[group.num_tiles,], **dict(padded), **constants)
    num_parts = -(-max(widths) // constants["N"])
    if kernel == "accumulate":
        return partial(_accumulate[group.num_spans, num_parts], **dict(padded), **constants)
    if by_b:
        return partial(_expand[group.num_tiles, num_parts], **dict(padded), **constants)
    return partial(_expand_sum[group.num_joins, num_parts], width=widths[0], **constants)


def shrink_constants(kind: TileClass, *, by_b: bool, num_siblings: int = 1) -> dict[str, int]:
    features = {"M": TILE_ROWS, "K": 128 if kind.width <= 32 else 64}
    of_siblings = {"SIBLINGS": num_siblings, "BY_B": by_b, "ALIGNED": kind.is_aligned or not by_b}
    return features | of_siblings | _constants(kind, by_b=by_b) | _more_warps(kind)


def expand_constants(kind: TileClass, *, by_b: bool, num_siblings: int = 1) -> dict[str, int]:
    constants = {"M": TILE_ROWS, "N": 128 if kind.width <= 32 else 64} | _constants(kind, by_b=by_b)
    if by_b:
        del constants["DROPOUT"]
        return constants | {"SIBLINGS": num_siblings, "ALIGNED": kind.is_aligned}
    return constants | {"num_stages": 1}  # the loop over siblings is too short to load ahead


def accumulate_constants(kind: TileClass, *, by_b: bool, num_siblings: int = 1) -> dict[str, int]:
    features = {"T": TILE_ROWS, "N": 64, "SIBLINGS": num_siblings, "BY_B": by_b}
    return features | _constants(kind, by_b=by_b) | _more_warps(kind)


def _constants(kind: TileClass, *, by_b: bool) -> dict[str, int]:
    """Return the constants of all kernels. B has no dropout.

    Fusing a product and a sum is set here because its default depends on Triton's version.
    """
    return {
        "W": kind.width,
        "DROPOUT": kind.has_dropout and not by_b,
        "num_warps": NUM_WARPS,
        "num_stages": NUM_STAGES,
        "enable_fp_fusion": True,
    }


def _more_warps(kind: TileClass) -> dict[str, int]:
    """Return the warps of a kernel that would spill registers with fewer at the largest width."""
    return {"num_warps": 2 * NUM_WARPS} if kind.width == WIDTHS[-1] else {}


CONSTANTS = {"shrink": shrink_constants, "expand": expand_constants, "accumulate": accumulate_constants}


@triton.jit
def _number(entry, WORD_OF_FIELD: tl.constexpr):
    """Read a float64 of an entry as float32."""
    return tl.load(entry + WORD_OF_FIELD).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _small(entry):
    """Read a number of an entry as int32: addresses are computed from these, and 64 bits need twice the registers."""
    return tl.load(entry).to(tl.int32)


@triton.jit
def _weights(entry, start, features_F, ranks_W, width, DTYPE: tl.constexpr, BY_B: tl.constexpr, ALIGNED: tl.constexpr):
    """Load features start + F of A or B as [F, W], 0 outside. A is [rank, width] in memory, B is [width, rank]."""
    rank = tl.load(entry + RANK)  # not by _small: Triton 3.7 loses a hint for the result of a call
    if ALIGNED and BY_B:
        rank = tl.multiple_of(rank, 8)
    rank = rank.to(tl.int32)
    visible_FW = (start + features_F < width)[:, None] & (ranks_W < rank)[None, :]
    address = tl.load(entry + (B if BY_B else A))
    matrix = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    if BY_B:
        places_FW = features_F[:, None] * rank + ranks_W[None, :]
        return tl.load(matrix + start * rank + places_FW, mask=visible_FW, other=0.0)
    places_FW = features_F[:, None] + ranks_W[None, :] * width
    return tl.load(matrix + start + places_FW, mask=visible_FW, other=0.0)


@triton.jit
def _keep_factors(entry, tokens_M, start, width, M: tl.constexpr, K: tl.constexpr):
    """Return the factors of dropout fp32 [M, K]: 0 for dropped elements, features start to start + K.

    The random numbers follow the elements of the segment in their order.
    """
    key, next_key = tl.load(entry + KEY).to(tl.uint64), tl.load(entry + KEY + 1).to(tl.uint64)
    flips = random_numbers((tokens_M * width + start) >> 4, key, next_key, M, K)
    return tl.where(flips < tl.load(entry + THRESHOLD).to(tl.int32), _number(entry, FACTOR), 0.0)


@triton.jit
def _dropped(x_MK, entry, tokens_M, start, width, M: tl.constexpr, K: tl.constexpr):
    """Return dropout(x) in the dtype of x, rounded as on a CPU: first the factor, then the product."""
    factors = _keep_factors(entry, tokens_M, start, width, M, K).to(x_MK.dtype)
    return (x_MK.to(tl.float32) * factors.to(tl.float32)).to(x_MK.dtype)


@triton.jit
def _of_sibling(sibling, first, second, third, SIBLINGS: tl.constexpr):
    """Return the address or the width that belongs to a sibling."""
    chosen = first
    if SIBLINGS > 1:
        chosen = tl.where(sibling == 1, second, chosen)
    if SIBLINGS > 2:
        chosen = tl.where(sibling == 2, third, chosen)
    return chosen


@triton.jit
def _shrink(
    x0, x1, x2, h, entries, tiles, width0, width1, width2,
    SIBLINGS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
    BY_B: tl.constexpr, ALIGNED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * WORDS_OF_TILE
    entry = entries + tl.load(tile) * ENTRY_WORDS
    sibling = tl.load(tile + 5)
    x = _of_sibling(sibling, x0, x1, x2, SIBLINGS)
    width = _of_sibling(sibling, width0, width1, width2, SIBLINGS)
    rows_M, features_K, ranks_W = tl.arange(0, M), tl.arange(0, K), tl.arange(0, W)
    inside_M = rows_M < _small(tile + 2)
    tokens_M = tl.load(tile + 4) + rows_M
    x_tile, places_MK = x + tl.load(tile + 1) * width, rows_M[:, None] * width + features_K[None, :]
    sums_MW = tl.zeros((M, W), tl.float32)
    for start in range(0, width, K):
        inside_MK = inside_M[:, None] & (start + features_K < width)[None, :]
        x_MK = tl.load(x_tile + start + places_MK, mask=inside_MK, other=0.0)
        if DROPOUT:
            x_MK = _dropped(x_MK, entry, tokens_M, start, width, M, K)
        weights_KW = _weights(entry, start, features_K, ranks_W, width, x0.dtype.element_ty, BY_B, ALIGNED)
        sums_MW = tl.dot(x_MK, weights_KW, sums_MW, input_precision="ieee")
    h_MW = (sums_MW * _number(entry, SCALE)).to(h.dtype.element_ty)
    h_tile = h + tl.load(tile + 3) * W
    tl.store(h_tile + rows_M[:, None] * W + ranks_W[None, :], h_MW, mask=inside_M[:, None])


@triton.jit
def _expand(
    h, y0, y1, y2, entries, tiles, width0, width1, width2,
    SIBLINGS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * WORDS_OF_TILE
    sibling, start = tl.load(tile + 5), tl.program_id(1) * N
    width = _of_sibling(sibling, width0, width1, width2, SIBLINGS)
    if start < width:
        y = _of_sibling(sibling, y0, y1, y2, SIBLINGS)
        entry = entries + tl.load(tile) * ENTRY_WORDS
        rows_M, features_N, ranks_W = tl.arange(0, M), tl.arange(0, N), tl.arange(0, W)
        inside_M = rows_M < _small(tile + 2)
        h_tile = h + tl.load(tile + 3) * W
        h_MW = tl.load(h_tile + rows_M[:, None] * W + ranks_W[None, :], mask=inside_M[:, None], other=0.0)
        weights_NW = _weights(entry, start, features_N, ranks_W, width, h.dtype.element_ty, True, ALIGNED)
        added_MN = tl.dot(h_MW, tl.trans(weights_NW), input_precision="ieee")
        places_MN = y + tl.load(tile + 1) * width + start + (rows_M[:, None] * width + features_N[None, :])
        inside_MN = inside_M[:, None] & (start + features_N < width)[None, :]
        y_MN = tl.load(places_MN, mask=inside_MN, other=0.0).to(tl.float32) + added_MN
        tl.store(places_MN, y_MN.to(y0.dtype.element_ty), mask=inside_MN)


@triton.jit
def _expand_sum(
    h, y, entries, joins, width,
    M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    join = joins + tl.program_id(0) * WORDS_OF_JOIN
    start = tl.program_id(1) * N
    rows_M, features_N, ranks_W = tl.arange(0, M), tl.arange(0, N), tl.arange(0, W)
    inside_M, tokens_M = rows_M < _small(join + 1), tl.load(join + 2) + rows_M
    added_MN = tl.zeros((M, N), tl.float32)
    for member in range(0, _small(join + 3)):
        entry = entries + tl.load(join + 4 + 2 * member) * ENTRY_WORDS
        h_tile = h + tl.load(join + 5 + 2 * member) * W
        h_MW = tl.load(h_tile + rows_M[:, None] * W + ranks_W[None, :], mask=inside_M[:, None], other=0.0)
        weights_NW = _weights(entry, start, features_N, ranks_W, width, h.dtype.element_ty, False, True)
        product_MN = tl.dot(h_MW, tl.trans(weights_NW), input_precision="ieee")
        if DROPOUT:
            factors = _keep_factors(entry, tokens_M, start, width, M, N).to(y.dtype.element_ty)
            product_MN *= factors.to(tl.float32)
        added_MN += product_MN
    places_MN = y + tl.load(join) * width + start + (rows_M[:, None] * width + features_N[None, :])
    inside_MN = inside_M[:, None] & (start + features_N < width)[None, :]
    y_MN = tl.load(places_MN, mask=inside_MN, other=0.0).to(tl.float32) + added_MN
    tl.store(places_MN, y_MN.to(y.dtype.element_ty), mask=inside_MN)


@triton.jit
def _accumulate(
    x0, x1, x2, h, entries, spans, width0, width1, width2,
    SIBLINGS: tl.constexpr, T: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    BY_B: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    span = spans + tl.program_id(0) * WORDS_OF_SPAN
    sibling, start = tl.load(span + 4), tl.program_id(1) * N
    width = _of_sibling(sibling, width0, width1, width2, SIBLINGS)
    if start < width:
        x = _of_sibling(sibling, x0, x1, x2, SIBLINGS)
        entry = entries + tl.load(span) * ENTRY_WORDS
        first, num_tokens = tl.load(span + 1), _small(span + 2) - _small(span + 1)
        rows_T, features_N, ranks_W = tl.arange(0, T), tl.arange(0, N), tl.arange(0, W)
        inside_N = start + features_N < width
        places_TN, places_TW = rows_T[:, None] * width + features_N[None, :], rows_T[:, None] * W + ranks_W[None, :]
        h_span = h + tl.load(span + 3) * W
        sums_NW = tl.zeros((N, W), tl.float32)
        for token in range(0, num_tokens, T):
            here_T = token + rows_T < num_tokens
            x_tile = x + (first + token) * width + start
            x_TN = tl.load(x_tile + places_TN, mask=here_T[:, None] & inside_N[None, :], other=0.0)
            if DROPOUT:
                x_TN = _dropped(x_TN, entry, token + rows_T.to(tl.int64), start, width, T, N)
            h_TW = tl.load(h_span + token * W + places_TW, mask=here_T[:, None], other=0.0)
            sums_NW = tl.dot(tl.trans(x_TN), h_TW, sums_NW, input_precision="ieee")
        trained = _small(entry + TRAINED)
        gradient = tl.load(entry + (GRAD_B if BY_B else GRAD_A)).to(tl.pointer_type(tl.float32))
        if BY_B:
            places_NW = gradient + start * trained + (features_N[:, None] * trained + ranks_W[None, :])
        else:
            places_NW = gradient + start + (features_N[:, None] + ranks_W[None, :] * width)
        inside_NW = inside_N[:, None] & (ranks_W < trained)[None, :]
        tl.store(places_NW, tl.load(places_NW, mask=inside_NW, other=0.0) + sums_NW, mask=inside_NW)
