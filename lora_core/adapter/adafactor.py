# pyright: basic
"""Adafactor (arXiv 1804.04235) over one flat adapter, numerically the same as torch.optim.Adafactor.

For an n by k matrix it stores the mean squares of rows and columns, n + k numbers instead of Adam's 2 · n · k. For a
vector it stores each square. There is no momentum. Each block (matrix or vector) moves relative to its own root mean
square, so a learning rate is a relative step size.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.config import OptimizerConfig

EPS = torch.finfo(torch.float32).eps
"""epsilon1 in torch: lower limit of the root of a mean square, and of the mean of a matrix's mean squares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One matrix or vector: its span in p and g, its shape, and the span of its state in v."""

    numbers: slice
    shape: tuple[int, ...]
    memory: slice


def lay_out_blocks(shapes: Iterable[tuple[int, ...]]) -> tuple[Block, ...]:
    """Return the blocks of tensors that are stored contiguously, in order."""
    blocks: list[Block] = []
    start = memory_start = 0
    for shape in shapes:
        assert len(shape) in (1, 2), shape
        stop = start + math.prod(shape)
        memory_stop = memory_start + sum(shape)  # for a vector, sum(shape) is its length
        blocks.append(Block(numbers=slice(start, stop), shape=shape, memory=slice(memory_start, memory_stop)))
        start, memory_start = stop, memory_stop
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
    """Apply one step to each block with its learning rate. `step` counts from 1. Overwrites the gradient g [N]."""
    for block, rate in rated:
        p_block, g_block = (vector[block.numbers].view(block.shape) for vector in (p, g))
        _step_block(p_block, g_block, v[block.memory], config, step=step, rate=rate)


def _step_block(p: Tensor, g: Tensor, v: Tensor, config: OptimizerConfig, *, step: int, rate: float) -> None:
    """Update p from g, both [n, k] or [n].

    Root mean squares are fp64 so that no square overflows. Nothing synchronizes with the host.
    """
    size = _root_mean_square(p).clamp_(min=config.scale_floor)
    p.mul_(1 - rate * config.weight_decay)
    update = g.mul_(_mean_squares(g, v, newest=step**config.beta2_decay).clamp_(min=EPS * EPS).rsqrt_())
    excess = _root_mean_square(update).div_(config.clip_threshold).clamp_(min=1)
    p.sub_(update.mul_(size * min(rate, step**-0.5) / excess))


def _root_mean_square(x: Tensor) -> Tensor:
    """Return the root mean square: fp64 [], on the device of x."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).div_(math.sqrt(x.numel()))


def _mean_squares(g: Tensor, v: Tensor, *, newest: float) -> Tensor:
    """Update v with weight `newest` for the squares of g. Return the mean square of each element, shaped like g.

    For a matrix it is rows · columns / mean(rows). Dividing first matters: the product alone overflows for gradients
    above 1e9.
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
    """Return upper bounds of the numbers in a step: a square, the decay factor, and a weight after the step.

    An update of N numbers with the root mean square d has no element above d · √N.
    """
    kept = abs(1 - highest * config.weight_decay)
    moved = max(config.scale_floor, largest) * min(highest, 1.0) * config.clip_threshold * math.sqrt(largest_block)
    return norm * norm, kept, largest * max(1.0, kept) + moved
