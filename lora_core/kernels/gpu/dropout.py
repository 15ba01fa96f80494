# pyright: basic, reportIndexIssue=false, reportMissingImports=false
"""Random numbers of dropout as Triton code: those of lora_core/runtime/counter_rng.py, which a host draws.

Philox-4x64 yields 16 numbers of 16 bits in each block. Shape suffixes: M rows and K numbers of a tile.
"""

import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

ROWS, COLUMNS = 64, 64
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
UNSPECIALIZED = ("key", "next_key", "threshold", "num_elements")
"""Each value of these would be a kernel of its own."""


def draw_mask(key: NDArray, threshold: int, like: Tensor) -> Tensor:
    """Return the mask that `coin_flips` gives for the key, uint64 [2]: uint8 shaped as `like`, 1 for kept elements."""
    keep = torch.empty(like.shape, dtype=torch.uint8, device=like.device)
    if keep.numel():
        words = key.view("<i8").tolist()
        grid = (triton.cdiv(keep.numel(), ROWS * COLUMNS),)
        _draw_mask[grid](keep, *words, threshold, keep.numel(), M=ROWS, K=COLUMNS, **OPTIONS)
    return keep


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _draw_mask(keep, key, next_key, threshold, num_elements, M: tl.constexpr, K: tl.constexpr):
    rows_M = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    numbers_MK = random_numbers(rows_M * (K // 16), key.to(tl.uint64), next_key.to(tl.uint64), M, K)
    places_MK = rows_M[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(keep + places_MK, (numbers_MK < threshold).to(tl.uint8), mask=places_MK < num_elements)


@triton.jit
def random_numbers(first_M, key, next_key, M: tl.constexpr, K: tl.constexpr):
    """Return numbers of 16 bits, int32 [M, K]: row m has those of K / 16 blocks from block `first_M`[m] on."""
    first_M += 1  # NumPy increments the counter before the first block
    blocks = (first_M[:, None] + tl.arange(0, K // 16)[None, :]).to(tl.uint64)
    zeros = tl.zeros_like(blocks)
    w0, w1, w2, w3 = tl.philox_impl(blocks, zeros, zeros, zeros, zeros + key, zeros + next_key)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (M, K // 4))
    halves = tl.join((words & 0xFFFFFFFF).to(tl.uint32), (words >> 32).to(tl.uint32))
    halves = tl.reshape(halves, (M, K // 2))
    return tl.reshape(tl.join(halves & 0xFFFF, halves >> 16), (M, K)).to(tl.int32)
