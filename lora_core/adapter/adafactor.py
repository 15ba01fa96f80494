# pyright: basic
"""Adafactor (arXiv 1804.04235) over one flat adapter, with the numbers that torch.optim.Adafactor has.

Letters: n by k is one matrix of the adapter. It remembers the mean squares of its rows and its columns, n + k numbers
where Adam has n · k twice; a vector remembers each square. There is no momentum. A block of the adapter, matrix or
vector, moves by a share of its own size, so a rate says how large a share and not how far.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.config import OptimizerConfig

EPS = torch.finfo(torch.float32).eps
"""torch's epsilon1: the root of a mean square is held above it, and so is the mean of a matrix's mean squares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One matrix or vector: where it lies in p and g, its shape, and where what it remembers lies in v."""

    numbers: slice
    shape: tuple[int, ...]
    memory: slice


def lay_out_blocks(shapes: Iterable[tuple[int, ...]]) -> tuple[Block, ...]:
    """Of tensors that lie one behind the other."""
    blocks: list[Block] = []
    start = remembered = 0
    for shape in shapes:
        assert len(shape) in (1, 2), shape
        stop, last = start + math.prod(shape), remembered + sum(shape)  # a vector's sum is its length
        blocks.append(Block(numbers=slice(start, stop), shape=shape, memory=slice(remembered, last)))
        start, remembered = stop, last
    return tuple(blocks)


def adafactor_step(
    p: Tensor,
    g: Tensor,
    v: Tensor,
    rated: Iterable[tuple[Block, float]],
    config: OptimizerConfig,
    *,
    step: int,
) -> None:
    """One step of each block at its rate; the flat vector g [N] is used up."""
    for block, rate in rated:
        p_block, g_block = (vector[block.numbers].view(block.shape) for vector in (p, g))
        _step_block(p_block, g_block, v[block.memory], config, step=step, rate=rate)


def _step_block(p: Tensor, g: Tensor, v: Tensor, config: OptimizerConfig, *, step: int, rate: float) -> None:
    """p and g [n, k] or [n]. Sizes are root mean squares, in fp64 so that no square of theirs overflows; nothing is
    read back to the host."""
    size = _root_mean_square(p).clamp_(min=config.scale_floor)
    p.mul_(1 - rate * config.weight_decay)
    update = g.mul_(_mean_squares(g, v, newest=step**config.beta2_decay).clamp_(min=EPS * EPS).rsqrt_())
    excess = _root_mean_square(update).div_(config.clip_threshold).clamp_(min=1)
    p.sub_(update.mul_(size * min(rate, step**-0.5) / excess))


def _root_mean_square(x: Tensor) -> Tensor:
    """fp64 [], on the device of x."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).div_(math.sqrt(x.numel()))


def _mean_squares(g: Tensor, v: Tensor, *, newest: float) -> Tensor:
    """The estimate for each number, shaped as g; v is brought up to date, in which the newest squares weigh `newest`.

    Of a matrix it is rows · columns / mean of rows. The division goes first here: the product of the two alone
    overflows where gradients exceed 1e9.
    """
    if g.dim() == 1:
        return v.lerp_(g * g, newest).clone()
    rows_n, columns_k = v.split(list(g.shape))
    rows_n.lerp_(torch.linalg.vector_norm(g, dim=1).square_().div_(g.shape[1]), newest)
    columns_k.lerp_(torch.linalg.vector_norm(g, dim=0).square_().div_(g.shape[0]), newest)
    return torch.outer(rows_n / rows_n.mean().clamp_(min=EPS), columns_k)


def adafactor_bounds(
    config: OptimizerConfig, *, largest_block: int, largest: float, highest: float, norm: float
) -> tuple[float, ...]:
    """What no number of a step exceeds: a square, the factor of decay, and a weight after it.

    An update of N numbers with the root mean square d has none above d · √N.
    """
    kept = abs(1 - highest * config.weight_decay)
    moved = max(config.scale_floor, largest) * min(highest, 1.0) * config.clip_threshold * math.sqrt(largest_block)
    return norm * norm, kept, largest * max(1.0, kept) + moved
