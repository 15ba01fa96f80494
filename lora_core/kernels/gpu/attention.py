# pyright: basic, reportIndexIssue=false, reportMissingImports=false
"""Attention within each sequence of a pack as Triton kernels: one launch forward, and two backward.

They take what FlashAttention does not: capped scores, and fp32. For q, k and v of one head, scores are
s = softcap · tanh(scale · q kᵀ / softcap), or scale · q kᵀ without a cap, and y = softmax(s) v. The backward computes
the scores again. A program reads one sequence in a fixed order, in tiles that begin at its first token. No sum uses
atomic additions. So the bits of a sequence do not depend on its packmates, and are the same in each run.

Shape suffixes: H query heads, K key heads, T tokens of the pack, S sequences, E head features; M query rows and N keys
of a tile. A query at position i of its sequence sees the keys from i - before to i + after.
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.gpu.visible_keys import VisibleKeys

PRECISION = tl.constexpr("tf32x3")
"""Precision of fp32 products: three products on tensor cores, of the leading and of the remaining bits."""
SMALLEST = 16
"""Least number of features in a matrix product of Triton."""
TILES = {
    (2, 32): ((64, 64, 4), (64, 64, 4)),
    (2, 64): ((64, 64, 4), (64, 32, 8)),
    (2, 128): ((64, 64, 8), (64, 32, 8)),
    (2, 256): ((64, 32, 8), (32, 32, 8)),
    (4, 32): ((32, 32, 8), (16, 16, 4)),
    (4, 64): ((32, 32, 8), (32, 32, 8)),
    (4, 128): ((16, 32, 8), (16, 16, 8)),
}
"""For the forward and for the backward: rows that a program owns, rows that it reads at a time, and its warps. The keys
are bytes of a number and features of a head. Larger tiles would spill registers (tests/lora_core/kernels/gpu)."""
UNSPECIALIZED = ("num_tiles", "num_tokens", "before", "after")
"""Numbers that differ between passes and layers. A kernel is compiled once for all of their values."""


def attend(heads: Sequence[Tensor], bounds_S: Tensor, longest: int, visible: VisibleKeys) -> tuple[Tensor, Tensor]:
    """Return y [T, H, E], and log Σ eˢ of each row, fp32 [H, T].

    `heads` are q [H, T, E], k and v [K, T, E], whose last dimension is contiguous. `bounds_S` int32 [S + 1] are the
    bounds of the sequences, the longest of which has `longest` tokens.
    """
    query, key, _ = heads
    num_heads, num_tokens, size = query.shape
    y_THE = query.new_empty(num_tokens, num_heads, size)
    logs_HT = query.new_empty(num_heads, num_tokens, dtype=torch.float32)
    constants = tile_constants(query.dtype, size, "forward")
    num_tiles = -(-longest // constants["M"])
    _attend[(len(bounds_S) - 1) * num_tiles, num_heads](
        *heads, y_THE, logs_HT, bounds_S, *_strides(heads), num_tiles, num_heads, num_heads // len(key), size,
        num_tokens, *visible.numbers, CAPPED=visible.softcap > 0, **constants,
    )  # fmt: skip
    return y_THE, logs_HT


def attend_backward(
    dy_THE: Tensor,
    heads: Sequence[Tensor],
    y_THE: Tensor,
    logs_HT: Tensor,
    bounds_S: Tensor,
    longest: int,
    visible: VisibleKeys,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q [T, H, E], and of k and v [T, K, E]. `dy_THE` must be contiguous."""
    query, key, _ = heads
    num_heads, num_tokens, size = query.shape
    dq_THE, means_HT = torch.empty_like(y_THE), torch.empty_like(logs_HT)
    dk_TKE, dv_TKE = (y_THE.new_empty(num_tokens, len(key), size) for _ in range(2))
    sizes, num_sequences = (num_heads, num_heads // len(key), size, num_tokens), len(bounds_S) - 1
    constants, is_capped = tile_constants(query.dtype, size, "queries"), visible.softcap > 0
    num_tiles = -(-longest // constants["M"])
    _query_gradient[num_sequences * num_tiles, num_heads](
        *heads, y_THE, dy_THE, logs_HT, means_HT, dq_THE, bounds_S, *_strides(heads), num_tiles, *sizes,
        *visible.numbers, CAPPED=is_capped, **constants,
    )  # fmt: skip
    constants = tile_constants(query.dtype, size, "keys")
    num_tiles = -(-longest // constants["N"])
    _key_gradients[num_sequences * num_tiles, len(key)](
        *heads, dy_THE, logs_HT, means_HT, dk_TKE, dv_TKE, bounds_S, *_strides(heads), num_tiles, *sizes,
        *visible.numbers, CAPPED=is_capped, **constants,
    )  # fmt: skip
    return dq_THE, dk_TKE, dv_TKE


@cache
def tile_constants(dtype: torch.dtype, size: int, direction: Literal["forward", "queries", "keys"]) -> dict[str, int]:
    """Return the compile-time constants for heads of `size` features, which are padded in registers.

    They depend on the model alone. Fusing a product and a sum is set because its default depends on Triton's version.
    """
    width, is_half = max(SMALLEST, 1 << (size - 1).bit_length()), dtype.itemsize == 2
    own, other, num_warps = TILES[dtype.itemsize, max(width, 32)][direction != "forward"]
    return {
        "M": other if direction == "keys" else own,
        "N": own if direction == "keys" else other,
        "E": width,
        "num_warps": num_warps,
        "num_stages": 2 if is_half and width < 256 and direction != "keys" else 1,
        "enable_fp_fusion": True,
    }


def _strides(heads: Sequence[Tensor]) -> list[int]:
    """Return the strides of a token and of a head, in q, k and v."""
    assert all(part.stride(2) == 1 for part in heads)
    return [stride for part in heads for stride in (part.stride(1), part.stride(0))]


@triton.jit
def _tanh(x):
    """Return tanh x with an error of at most four units in the last place, as kernels/numba_jit.py does."""
    bounded = tl.minimum(tl.maximum(x, -7.90531110763549805), 7.90531110763549805)
    square = bounded * bounded
    p = square * -2.76076847742355e-16 + 2.00018790482477e-13
    p = p * square - 8.60467152213735e-11
    p = p * square + 5.12229709037114e-08
    p = p * square + 1.48572235717979e-05
    p = p * square + 6.37261928875436e-04
    p = p * square + 4.89352455891786e-03
    q = square * 1.19825839466702e-06 + 1.18534705686654e-04
    q = q * square + 2.26843463243900e-03
    q = q * square + 4.89352518554385e-03
    return tl.where(tl.abs(x) >= 0.0, bounded * p / q, x)  # NaN stays NaN


@triton.jit
def scored(products, inner, softcap, CAPPED: tl.constexpr):
    """Return the scores, and the derivative of a score by scale · q·k."""
    if CAPPED:
        tangents = _tanh(products * inner)
        return tangents * softcap, 1.0 - tangents * tangents
    else:
        return products * inner, 1.0


@triton.jit
def _rows(source, start, rows_R, length, token_stride, features_E, size):
    """Load rows of one sequence and head [R, E], zeros outside. `source` is the head's row at the first token."""
    inside_RE = (rows_R < length)[:, None] & (features_E < size)[None, :]
    places_RE = (start + rows_R).to(tl.int64)[:, None] * token_stride + features_E[None, :]
    return tl.load(source + places_RE, mask=inside_RE, other=0.0)


@triton.jit
def _store_rows(target, values_RE, start, rows_R, length, token_stride, features_E, size):
    inside_RE = (rows_R < length)[:, None] & (features_E < size)[None, :]
    places_RE = (start + rows_R).to(tl.int64)[:, None] * token_stride + features_E[None, :]
    tl.store(target + places_RE, values_RE.to(target.dtype.element_ty), mask=inside_RE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attend(
    q, k, v, y, logs, bounds, q_token, q_head, k_token, k_head, v_token, v_head,
    num_tiles, num_heads, group, size, num_tokens, inner, scale, softcap, before, after,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0) // num_tiles, tl.program_id(1)
    start, first = tl.load(bounds + sequence), tl.program_id(0) % num_tiles * M
    length = tl.load(bounds + sequence + 1) - start
    if first < length:
        rows_M, features_E = first + tl.arange(0, M), tl.arange(0, E)
        q_ME = _rows(q + head * q_head, start, rows_M, length, q_token, features_E, size)
        k_of_head, v_of_head = k + head // group * k_head, v + head // group * v_head
        largest_M, sums_M = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
        y_ME = tl.zeros((M, E), tl.float32)
        for key in range(tl.maximum(first - before, 0) // N * N, tl.minimum(first + M + after, length), N):
            keys_N = key + tl.arange(0, N)
            k_NE = _rows(k_of_head, start, keys_N, length, k_token, features_E, size)
            v_NE = _rows(v_of_head, start, keys_N, length, v_token, features_E, size)
            scores_MN, _ = scored(tl.dot(q_ME, tl.trans(k_NE), input_precision=PRECISION), inner, softcap, CAPPED)
            distance_MN = rows_M[:, None] - keys_N[None, :]
            seen_MN = (distance_MN <= before) & (distance_MN >= -after) & (keys_N < length)[None, :]
            scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
            highest_M = tl.maximum(largest_M, tl.max(scores_MN, 1))
            base_M = tl.where(highest_M == float("-inf"), 0.0, highest_M)  # no key of a row was visible so far
            weights_MN, kept_M = tl.exp(scores_MN - base_M[:, None]), tl.exp(largest_M - base_M)
            sums_M = sums_M * kept_M + tl.sum(weights_MN, 1)
            y_ME = tl.dot(weights_MN.to(v_NE.dtype), v_NE, y_ME * kept_M[:, None], input_precision=PRECISION)
            largest_M = highest_M
        sums_M = tl.where(rows_M < length, sums_M, 1.0)  # rows behind the sequence see no key
        _store_rows(y + head * size, y_ME / sums_M[:, None], start, rows_M, length, num_heads * size, features_E, size)
        tl.store(logs + head * num_tokens + start + rows_M, largest_M + tl.log(sums_M), mask=rows_M < length)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _query_gradient(
    q, k, v, y, dy, logs, means, dq, bounds, q_token, q_head, k_token, k_head, v_token, v_head,
    num_tiles, num_heads, group, size, num_tokens, inner, scale, softcap, before, after,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0) // num_tiles, tl.program_id(1)
    start, first = tl.load(bounds + sequence), tl.program_id(0) % num_tiles * M
    length = tl.load(bounds + sequence + 1) - start
    if first < length:
        rows_M, features_E, width = first + tl.arange(0, M), tl.arange(0, E), num_heads * size
        q_ME = _rows(q + head * q_head, start, rows_M, length, q_token, features_E, size)
        dy_ME = _rows(dy + head * size, start, rows_M, length, width, features_E, size)
        y_ME = _rows(y + head * size, start, rows_M, length, width, features_E, size)
        mean_M = tl.sum(dy_ME.to(tl.float32) * y_ME.to(tl.float32), 1)
        numbers_M = head * num_tokens + start + rows_M
        tl.store(means + numbers_M, mean_M, mask=rows_M < length)
        logs_M = tl.load(logs + numbers_M, mask=rows_M < length, other=0.0)
        k_of_head, v_of_head = k + head // group * k_head, v + head // group * v_head
        dq_ME = tl.zeros((M, E), tl.float32)
        for key in range(tl.maximum(first - before, 0) // N * N, tl.minimum(first + M + after, length), N):
            keys_N = key + tl.arange(0, N)
            k_NE = _rows(k_of_head, start, keys_N, length, k_token, features_E, size)
            v_NE = _rows(v_of_head, start, keys_N, length, v_token, features_E, size)
            products_MN = tl.dot(q_ME, tl.trans(k_NE), input_precision=PRECISION)
            scores_MN, slopes_MN = scored(products_MN, inner, softcap, CAPPED)
            distance_MN = rows_M[:, None] - keys_N[None, :]
            seen_MN = (distance_MN <= before) & (distance_MN >= -after) & (keys_N < length)[None, :]
            weights_MN = tl.exp(tl.where(seen_MN, scores_MN - logs_M[:, None], float("-inf")))
            received_MN = tl.dot(dy_ME, tl.trans(v_NE), input_precision=PRECISION)
            ds_MN = weights_MN * (received_MN - mean_M[:, None]) * slopes_MN
            dq_ME = tl.dot(ds_MN.to(k_NE.dtype), k_NE, dq_ME, input_precision=PRECISION)
        _store_rows(dq + head * size, dq_ME * scale, start, rows_M, length, width, features_E, size)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_gradients(
    q, k, v, dy, logs, means, dk, dv, bounds, q_token, q_head, k_token, k_head, v_token, v_head,
    num_tiles, num_heads, group, size, num_tokens, inner, scale, softcap, before, after,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Sum over the queries of all heads that read the key head, head by head."""
    sequence, key_head = tl.program_id(0) // num_tiles, tl.program_id(1)
    start, first = tl.load(bounds + sequence), tl.program_id(0) % num_tiles * N
    length = tl.load(bounds + sequence + 1) - start
    if first < length:
        keys_N, features_E, width = first + tl.arange(0, N), tl.arange(0, E), num_heads * size
        k_NE = _rows(k + key_head * k_head, start, keys_N, length, k_token, features_E, size)
        v_NE = _rows(v + key_head * v_head, start, keys_N, length, v_token, features_E, size)
        dk_NE, dv_NE = tl.zeros((N, E), tl.float32), tl.zeros((N, E), tl.float32)
        for head in range(key_head * group, key_head * group + group):
            for row in range(tl.maximum(first - after, 0) // M * M, tl.minimum(first + N + before, length), M):
                rows_M = row + tl.arange(0, M)
                q_ME = _rows(q + head * q_head, start, rows_M, length, q_token, features_E, size)
                dy_ME = _rows(dy + head * size, start, rows_M, length, width, features_E, size)
                numbers_M = head * num_tokens + start + rows_M
                logs_M = tl.load(logs + numbers_M, mask=rows_M < length, other=0.0)
                mean_M = tl.load(means + numbers_M, mask=rows_M < length, other=0.0)
                products_NM = tl.dot(k_NE, tl.trans(q_ME), input_precision=PRECISION)
                scores_NM, slopes_NM = scored(products_NM, inner, softcap, CAPPED)
                distance_NM = rows_M[None, :] - keys_N[:, None]
                seen_NM = (distance_NM <= before) & (distance_NM >= -after) & (rows_M < length)[None, :]
                weights_NM = tl.exp(tl.where(seen_NM, scores_NM - logs_M[None, :], float("-inf")))
                dv_NE = tl.dot(weights_NM.to(dy_ME.dtype), dy_ME, dv_NE, input_precision=PRECISION)
                received_NM = tl.dot(v_NE, tl.trans(dy_ME), input_precision=PRECISION)
                ds_NM = weights_NM * (received_NM - mean_M[None, :]) * slopes_NM
                dk_NE = tl.dot(ds_NM.to(q_ME.dtype), q_ME, dk_NE, input_precision=PRECISION)
        width = tl.num_programs(1) * size
        _store_rows(dk + key_head * size, dk_NE * scale, start, keys_N, length, width, features_E, size)
        _store_rows(dv + key_head * size, dv_NE, start, keys_N, length, width, features_E, size)
