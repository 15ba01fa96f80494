# pyright: basic, reportIndexIssue=false, reportMissingImports=false
"""Random numbers of dropout masks, noise and initial weights, drawn on a GPU with the bits that a host draws.

The generator is Philox-4x64, as in lora_core/runtime/counter_rng.py. It yields four words of 64 bits in each block.
Shape suffixes: M rows and K numbers of a tile, W words of a row.
"""

import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

ROWS, COLUMNS = 64, 64
"""Rows and numbers of a tile of a dropout mask."""
WORDS = 512
"""Uniform numbers of a program."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
HALF = tl.constexpr(2**52)
UNIT = tl.constexpr(2.0**-52)
UNSPECIALIZED = ("key", "next_key", "num_elements")
"""Each value of these would be a kernel of its own."""


def draw_mask(key: NDArray, threshold: int, like: Tensor) -> Tensor:
    """Return the mask that `coin_flips` gives for the key, uint64 [2]: uint8 shaped as `like`, 1 for kept elements."""
    keep = torch.empty(like.shape, dtype=torch.uint8, device=like.device)
    if keep.numel():
        words = key.view("<i8").tolist()
        grid = (triton.cdiv(keep.numel(), ROWS * COLUMNS),)
        _draw_mask[grid](keep, *words, threshold, keep.numel(), M=ROWS, K=COLUMNS, **OPTIONS)
    return keep


def draw_within(key: NDArray, bounds_M: Tensor, num_columns: int) -> Tensor:
    """Return the numbers that `uniform_within` gives for the key, uint64 [2], and the bounds, fp64 [M]: fp32."""
    numbers = torch.empty(len(bounds_M), num_columns, device=bounds_M.device)
    if numbers.numel():
        words = key.view("<i8").tolist()
        grid = (triton.cdiv(numbers.numel(), WORDS),)
        _draw_within[grid](numbers, bounds_M, *words, num_columns, numbers.numel(), W=WORDS, **OPTIONS)
    return numbers


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "threshold"))
def _draw_mask(keep, key, next_key, threshold, num_elements, M: tl.constexpr, K: tl.constexpr):
    rows_M = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    numbers_MK = random_numbers(rows_M * (K // 16), key.to(tl.uint64), next_key.to(tl.uint64), M, K)
    places_MK = rows_M[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(keep + places_MK, (numbers_MK < threshold).to(tl.uint8), mask=places_MK < num_elements)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "num_columns"))
def _draw_within(out, bounds, key, next_key, num_columns, num_elements, W: tl.constexpr):
    """A word's highest 53 bits are a number k; u = k / 2^53, and the result is (2u - 1)·bound.

    2u - 1 is exact, so the product is the only operation in fp64 that rounds, on every device.
    """
    first = tl.program_id(0).to(tl.int64) * W
    places_W = first + tl.arange(0, W)
    blocks_M = (first >> 2) + tl.arange(0, W // 4)
    words_W = tl.reshape(random_words(blocks_M, key.to(tl.uint64), next_key.to(tl.uint64), W // 4, 4), (W,))
    signed_W = ((words_W >> 11).to(tl.int64) - HALF).to(tl.float64) * UNIT
    is_inside_W = places_W < num_elements
    bounds_W = tl.load(bounds + places_W // num_columns, mask=is_inside_W, other=0)
    tl.store(out + places_W, (signed_W * bounds_W).to(tl.float32), mask=is_inside_W)


@triton.jit
def random_numbers(first_M, key, next_key, M: tl.constexpr, K: tl.constexpr):
    """Return numbers of 16 bits, int32 [M, K]: row m has those of K / 16 blocks from block `first_M`[m] on."""
    words = random_words(first_M, key, next_key, M, K // 4)
    halves = tl.join((words & 0xFFFFFFFF).to(tl.uint32), (words >> 32).to(tl.uint32))
    halves = tl.reshape(halves, (M, K // 2))
    return tl.reshape(tl.join(halves & 0xFFFF, halves >> 16), (M, K)).to(tl.int32)


@triton.jit
def random_words(first_M, key, next_key, M: tl.constexpr, W: tl.constexpr):
    """Return words of 64 bits, uint64 [M, W]: row m has those of W / 4 blocks from block `first_M`[m] on."""
    first_M += 1  # NumPy increments the counter before the first block
    blocks = (first_M[:, None] + tl.arange(0, W // 4)[None, :]).to(tl.uint64)
    zeros = tl.zeros_like(blocks)
    w0, w1, w2, w3 = tl.philox_impl(blocks, zeros, zeros, zeros, zeros + key, zeros + next_key)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (M, W))
