# pyright: basic, reportIndexIssue=false, reportMissingImports=false
"""AdamW over the flat vectors of many adapters in one launch, and the sizes of their steps in two, as Triton kernels.

A table has one entry for each adapter. Sums run over blocks of fixed size in a fixed order, so their bits depend
neither on the number of multiprocessors nor on other adapters. Shape suffixes: J adapters, N parameters of an adapter,
E elements of a block.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.gpu.optimizer_table import ADDRESSES, NUM_WORDS, STEP, WORD, AdamwStep, are_aligned
from lora_core.runtime.transfers import upload

BLOCK = 2048
SIZED_BLOCK = 8192
"""Elements of a partial sum. Another number changes the bits of gradient norms."""
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""Each operation is rounded, and divisions are exact, so ranks on unlike GPUs take the same step."""
SIZE_WORDS = 6
"""(address of g, of p, of m, count, row of the result, unused). Entries are multiples of 16 bytes: Triton compiles a
kernel again for a table that starts elsewhere, and tables of a kind start at any entry."""


def adamw(steps: Sequence[AdamwStep]) -> None:
    """Take all steps."""
    for launch in adamw_launches(steps):
        launch()


def adamw_launches(steps: Sequence[AdamwStep]) -> list[Callable[[], None]]:
    """Upload all steps in one copy.

    Returns one launch for each kind of alignment and copy, which only depend on the adapter itself.
    """
    ordered = sorted(steps, key=_kind)
    table = np.array([step.entry() for step in ordered], STEP).view(np.int64).reshape(-1, NUM_WORDS)
    (uploaded,) = upload([table], steps[0].p.device)
    launches: list[Callable[[], None]] = []
    start = 0
    for (is_aligned, has_copy), of_kind in groupby(ordered, _kind):
        same = list(of_kind)
        grid = -(-max(step.p.numel() for step in same) // BLOCK), len(same)
        constants = {"ALIGNED": is_aligned, "HAS_COPY": has_copy, **OPTIONS}
        launches.append(partial(_adamw[grid], uploaded[start:], BLOCK=BLOCK, **constants))
        start += len(same)
    return launches


def _kind(step: AdamwStep) -> tuple[bool, bool]:
    return step.is_aligned, step.compute is not None


def step_sizes(vectors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return fp32 [J, 3] for (g, p, m) of each adapter: the norm of g, and the largest absolute values of p and m.

    The three vectors of an adapter have the same length. There is one upload, and two launches for each kind of
    alignment.
    """
    device = vectors[0][0].device
    sizes = torch.empty(len(vectors), 3, device=device)
    rows = sorted(range(len(vectors)), key=lambda row: are_aligned(*vectors[row]))
    entries = [[*(part.data_ptr() for part in vectors[row]), vectors[row][0].numel(), row, 0] for row in rows]
    (table,) = upload([np.array(entries, np.int64)], device)
    start = 0
    for is_aligned, of_kind in groupby(rows, lambda row: are_aligned(*vectors[row])):
        same = list(of_kind)
        most = -(-max(vectors[row][0].numel() for row in same) // SIZED_BLOCK)
        partial_sizes = torch.empty(len(same), most, 3, device=device)
        own = table[start:]
        _partial_sizes[most, len(same)](own, partial_sizes, most, BLOCK=SIZED_BLOCK, ALIGNED=is_aligned, **OPTIONS)
        _whole_sizes[len(same),](own, partial_sizes, sizes, most, BLOCK=SIZED_BLOCK, MANY=1024, **OPTIONS)
        start += len(same)
    return sizes


@triton.jit
def _vector(entry, POSITION: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    vector = tl.load(entry + POSITION).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        vector = tl.multiple_of(vector, 16)
    return vector


@triton.jit
def _number(entry, POSITION: tl.constexpr):
    """Read a float64 as float32."""
    return tl.load(entry + POSITION).to(tl.float64, bitcast=True).to(tl.float32)


_P, _G, _M, _V, _COMPUTE = (tl.constexpr(WORD[name]) for name in ADDRESSES)
_COUNT, _FIRST, _LAST = (tl.constexpr(WORD[name]) for name in ("count", "plus_first", "plus_last"))
_CLIP, _NEWEST_M, _KEPT_V = (tl.constexpr(WORD[name]) for name in ("clip", "newest_m", "kept_v"))
_NEWEST_V, _ROOT, _EPS = (tl.constexpr(WORD[name]) for name in ("newest_v", "root", "eps"))
_DECAY, _RATE = tl.constexpr(WORD["decay"]), tl.constexpr(WORD["rate"])
_PLUS_DECAY, _PLUS_RATE = tl.constexpr(WORD["plus_decay"]), tl.constexpr(WORD["plus_rate"])
_NUM_WORDS = tl.constexpr(NUM_WORDS)
_SIZE_WORDS = tl.constexpr(SIZE_WORDS)


@triton.jit
def _within(place, BLOCK: tl.constexpr):
    """Return a 64-bit place relative to a block as 32 bits, between the block's bounds."""
    return tl.minimum(tl.maximum(place, 0), BLOCK).to(tl.int32)


@triton.jit
def _left(count, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Return how many of `count` elements belong to the block, with what the compiler can't know."""
    left = tl.minimum(tl.maximum(count, 0), BLOCK).to(tl.int32)  # Triton 3.7 loses a hint for the result of a call
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    return left


@triton.jit
def _adamw(table, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, HAS_COPY: tl.constexpr):
    entry = table + tl.program_id(1) * _NUM_WORDS
    count, start = tl.load(entry + _COUNT), tl.program_id(0).to(tl.int64) * BLOCK
    if start < count:
        places_E = tl.arange(0, BLOCK)  # relative to the block, because 64-bit numbers need twice the registers
        inside_E = places_E < _left(count - start, BLOCK, ALIGNED)
        p = _vector(entry, _P, tl.float32, ALIGNED) + start + places_E
        g = _vector(entry, _G, tl.float32, ALIGNED) + start + places_E
        m = _vector(entry, _M, tl.float32, ALIGNED) + start + places_E
        v = _vector(entry, _V, tl.float32, ALIGNED) + start + places_E
        g_E = tl.load(g, mask=inside_E, other=0.0) * _number(entry, _CLIP)
        m_E = tl.load(m, mask=inside_E, other=0.0)
        m_E += _number(entry, _NEWEST_M) * (g_E - m_E)
        v_E = tl.load(v, mask=inside_E, other=0.0) * _number(entry, _KEPT_V)
        v_E += _number(entry, _NEWEST_V) * g_E * g_E
        first, last = tl.load(entry + _FIRST) - start, tl.load(entry + _LAST) - start
        is_plus_E = (places_E >= _within(first, BLOCK)) & (places_E < _within(last, BLOCK))
        decay_E = tl.where(is_plus_E, _number(entry, _PLUS_DECAY), _number(entry, _DECAY))
        rate_E = tl.where(is_plus_E, _number(entry, _PLUS_RATE), _number(entry, _RATE))
        root_E = tl.div_rn(tl.sqrt_rn(v_E), _number(entry, _ROOT) + tl.zeros_like(v_E)) + _number(entry, _EPS)
        p_E = tl.load(p, mask=inside_E, other=0.0) * decay_E - rate_E * tl.div_rn(m_E, root_E)
        tl.store(p, p_E, mask=inside_E)
        tl.store(m, m_E, mask=inside_E)
        tl.store(v, v_E, mask=inside_E)
        tl.store(g, tl.zeros_like(g_E), mask=inside_E)
        if HAS_COPY:
            copy = _vector(entry, _COMPUTE, tl.bfloat16, ALIGNED) + start + places_E
            tl.store(copy, p_E.to(tl.bfloat16), mask=inside_E)


@triton.jit
def _largest(vector, places_E, inside_E):
    """Return the largest absolute value of a block. NaN counts as infinity."""
    sizes_E = tl.abs(tl.load(vector + places_E, mask=inside_E, other=0.0))
    return tl.max(tl.where(sizes_E >= 0, sizes_E, float("inf")))


@triton.jit(do_not_specialize=["num_blocks"])  # the number differs between steps, which would compile a kernel each
def _partial_sizes(table, partial, num_blocks, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    entry = table + tl.program_id(1) * _SIZE_WORDS
    count, start = tl.load(entry + 3), tl.program_id(0).to(tl.int64) * BLOCK
    if start < count:
        places_E = tl.arange(0, BLOCK)
        inside_E = places_E < _left(count - start, BLOCK, ALIGNED)
        g_E = tl.load(_vector(entry, 0, tl.float32, ALIGNED) + start + places_E, mask=inside_E, other=0.0)
        sizes = partial + (tl.program_id(1) * num_blocks + tl.program_id(0)) * 3
        tl.store(sizes, tl.sum(g_E * g_E))
        tl.store(sizes + 1, _largest(_vector(entry, 1, tl.float32, ALIGNED) + start, places_E, inside_E))
        tl.store(sizes + 2, _largest(_vector(entry, 2, tl.float32, ALIGNED) + start, places_E, inside_E))


@triton.jit(do_not_specialize=["num_blocks"])
def _whole_sizes(table, partial, sizes, num_blocks, BLOCK: tl.constexpr, MANY: tl.constexpr):
    adapter = tl.program_id(0)
    count, row = tl.load(table + adapter * _SIZE_WORDS + 3), tl.load(table + adapter * _SIZE_WORDS + 4)
    own_blocks = ((count + BLOCK - 1) // BLOCK).to(tl.int32)
    total, largest_p, largest_m = 0.0, 0.0, 0.0
    for start in range(0, own_blocks, MANY):
        blocks = start + tl.arange(0, MANY)
        places = partial + (adapter * num_blocks + blocks) * 3
        total += tl.sum(tl.load(places, mask=blocks < own_blocks, other=0.0))
        largest_p = tl.maximum(largest_p, tl.max(tl.load(places + 1, mask=blocks < own_blocks, other=0.0)))
        largest_m = tl.maximum(largest_m, tl.max(tl.load(places + 2, mask=blocks < own_blocks, other=0.0)))
    tl.store(sizes + row * 3, tl.sqrt_rn(total))
    tl.store(sizes + row * 3 + 1, largest_p)
    tl.store(sizes + row * 3 + 2, largest_m)
