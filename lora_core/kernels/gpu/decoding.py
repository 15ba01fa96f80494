# pyright: basic, reportIndexIssue=false, reportMissingImports=false
"""Attention from the newest token of each answer to its key-value cache as a Triton kernel, in one launch.

A program computes the query heads that share a key head, in one answer. It writes the new key and value to the cache,
begins its softmax with them, and then reads the older tokens in tiles, in order. No sum uses atomic additions. So the
bits of an answer do not depend on the other answers.

Shape suffixes: n answers, H query heads, K key heads, G = H / K, E head features; M query rows and N keys of a tile.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.gpu.attention import PRECISION, SMALLEST, scored
from lora_core.kernels.gpu.visible_keys import VisibleKeys

TILES = {
    (2, 32): (64, 4, 3),
    (2, 64): (64, 4, 3),
    (2, 128): (64, 4, 3),
    (2, 256): (32, 4, 3),
    (4, 32): (32, 4, 2),
    (4, 64): (32, 4, 2),
    (4, 128): (32, 4, 2),
    (4, 256): (16, 8, 1),
}
"""Keys that a program reads at a time, its warps, and the stages in which it loads and computes them. The keys of the
dictionary are bytes of a number and features of a head. More would spill registers for heads of 256 in fp32."""
UNSPECIALIZED = ("group", "num_before")
"""Numbers that differ between models and layers. A kernel is compiled once for all of their values."""


def attend_newest(heads: Sequence[Tensor], table_n4: Tensor, visible: VisibleKeys) -> Tensor:
    """Append one key and one value to the cache of each answer. Return y [n, H, E] of the new tokens.

    `heads` are q [H, n, E], k and v [K, n, E]. A copy is made of those that are not contiguous as [n, heads, E].
    `table_n4`, int64, has for each answer the addresses of its keys and of its values [K, capacity, E], the capacity,
    and the number of tokens before the new one. They have the dtype of `heads`. The new token sees `visible.before`
    tokens before its own.
    """
    query, key, value = (part.transpose(0, 1).contiguous() for part in heads)
    num_answers, num_heads, size = query.shape
    num_key_heads = key.shape[1]
    y_nHE, group = torch.empty_like(query), num_heads // num_key_heads
    inner, _, softcap, before, _ = visible.numbers
    constants = tile_constants(query.dtype, size)
    _attend_newest[num_answers, num_key_heads, -(-group // constants["M"])](
        query, key, value, y_nHE, table_n4, group, before, inner, softcap, CAPPED=softcap > 0, **constants
    )
    return y_nHE


@cache
def tile_constants(dtype: torch.dtype, size: int) -> dict[str, int]:
    """Return the compile-time constants for heads of `size` features. They do not depend on the number of heads."""
    width = max(32, 1 << (size - 1).bit_length())
    num_keys, num_warps, num_stages = TILES[dtype.itemsize, width]
    return {
        "M": SMALLEST,
        "N": num_keys,
        "E": width,
        "SIZE": size,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": True,
    }


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attend_newest(
    q, k, v, y, table, group, num_before, inner, softcap,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    answer, key_head = tl.program_id(0), tl.program_id(1)
    entry, row = table + answer * 4, answer * tl.num_programs(1) + key_head
    older, start = tl.load(entry + 3).to(tl.int32), key_head * tl.load(entry + 2) * SIZE  # 64 bits, one head needs 32
    keys = tl.multiple_of(tl.load(entry).to(tl.pointer_type(k.dtype.element_ty)), 16) + start
    values = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(v.dtype.element_ty)), 16) + start
    heads_M, features_E = tl.program_id(2) * M + tl.arange(0, M), tl.arange(0, E)
    is_feature_1E = (features_E < SIZE)[None, :]
    inside_ME = (heads_M < group)[:, None] & is_feature_1E
    places_ME = (row * group + heads_M)[:, None] * SIZE + features_E[None, :]
    q_ME = tl.load(q + places_ME, mask=inside_ME, other=0.0)
    new_ME = tl.broadcast_to(features_E[None, :], (M, E))  # the same row M times: one row would be read in narrow loads
    k_ME = tl.load(k + row * SIZE + new_ME, mask=is_feature_1E, other=0.0)
    v_ME = tl.load(v + row * SIZE + new_ME, mask=is_feature_1E, other=0.0)
    is_first_ME = (heads_M == 0)[:, None] & is_feature_1E
    tl.store(keys + older * SIZE + new_ME, k_ME, mask=is_first_ME)
    tl.store(values + older * SIZE + new_ME, v_ME, mask=is_first_ME)
    largest_M, _slopes_M = scored(tl.sum(q_ME.to(tl.float32) * k_ME.to(tl.float32), 1), inner, softcap, CAPPED)
    sums_M, y_ME = tl.full((M,), 1.0, tl.float32), v_ME.to(tl.float32)
    places_NE = tl.arange(0, N)[:, None] * SIZE + features_E[None, :]
    for first in range(tl.maximum(older - num_before, 0), older, N):
        is_older_N = first + tl.arange(0, N) < older
        inside_NE = is_older_N[:, None] & is_feature_1E
        k_NE = tl.load(keys + first * SIZE + places_NE, mask=inside_NE, other=0.0)
        v_NE = tl.load(values + first * SIZE + places_NE, mask=inside_NE, other=0.0)
        scores_MN, _slopes_MN = scored(tl.dot(q_ME, tl.trans(k_NE), input_precision=PRECISION), inner, softcap, CAPPED)
        scores_MN = tl.where(is_older_N[None, :], scores_MN, float("-inf"))
        highest_M = tl.maximum(largest_M, tl.max(scores_MN, 1))
        weights_MN, kept_M = tl.exp(scores_MN - highest_M[:, None]), tl.exp(largest_M - highest_M)
        sums_M = sums_M * kept_M + tl.sum(weights_MN, 1)
        y_ME = tl.dot(weights_MN.to(v_NE.dtype), v_NE, y_ME * kept_M[:, None], input_precision=PRECISION)
        largest_M = highest_M
    tl.store(y + places_ME, (y_ME / sums_M[:, None]).to(y.dtype.element_ty), mask=inside_ME)
