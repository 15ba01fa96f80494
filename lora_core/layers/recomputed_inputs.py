# pyright: basic
"""Inputs of linears that a backward recomputes instead of keeping them: outputs of norms and of gated activations.

On a GPU, the node of such a kernel marks its output with the tensors that the node keeps anyway. A linear then saves
these for its backward, and not its input. The recomputed input has the same bits. On a CPU nothing is marked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_core.kernels import on_device


@dataclass(kw_only=True, slots=True, eq=False)
class Recomputation:
    """Recomputes a tensor, once for all linears that read it. It holds no tensor until the first of them asks.

    The inputs are the saved tensors of the asking node, which activation checkpointing recomputes.
    """

    compute: Callable[..., Tensor]
    num_readers: int = 0
    _value: Tensor | None = None

    def read(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the tensor, and forget it after the last reader."""
        value = self.compute(*inputs) if self._value is None else self._value
        self.num_readers -= 1
        self._value = value if self.num_readers > 0 else None
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class InputOrigin:
    """The tensors from which `recomputation` computes the marked tensor."""

    inputs: tuple[Tensor, ...]
    recomputation: Recomputation


def mark(ctx: Any, y: Tensor, compute: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Note in the forward of a node that `compute` recomputes its output `y` from `inputs`, which the node saves."""
    if any(ctx.needs_input_grad) and on_device.on_gpu(y):
        y.origin = InputOrigin(inputs=inputs, recomputation=Recomputation(compute=compute))  # pyright: ignore[reportAttributeAccessIssue]


def origin_of(x: Tensor) -> InputOrigin | None:
    """Return how `x` is recomputed, or None if a backward must keep it. A view of `x` has no origin."""
    return getattr(x, "origin", None)


def is_recomputed_exactly(y: Tensor) -> bool:
    """Return whether the kernels of this device recompute `y` bit for bit, if it is marked."""
    origin = origin_of(y)
    return origin is None or torch.equal(origin.recomputation.compute(*origin.inputs), y)


def save_input(ctx: Any, x_TD: Tensor, origin: InputOrigin | None) -> None:
    """Save in the forward of a linear what its backward needs to read `x_TD`."""
    if origin is None:
        ctx.recomputation = None
        ctx.save_for_backward(x_TD)
    else:
        ctx.recomputation = origin.recomputation
        ctx.save_for_backward(*origin.inputs)
        ctx.recomputation.num_readers += 1


def saved_input(ctx: Any) -> Tensor:
    """Return the input [T, D] that `save_input` saved. Call it once."""
    if ctx.recomputation is None:
        return ctx.saved_tensors[0]
    x = ctx.recomputation.read(ctx.saved_tensors)
    return x.view(-1, x.shape[-1])
