# pyright: basic
"""RMSNorm in one pass over memory each way, alone or with the sum of the residual stream before it.

A norm is recognized by its class's name and parts and then asked: only where ours gives the numbers that the
library's forward gives is it replaced, on the instance and inside a pack. Letters: T tokens, D features.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lora_core.kernels.elementwise import add_rms_norm, rms_norm, rms_norm_backward
from lora_core.kernels.numba_jit import array_of, runs_on
from lora_core.layers.module_matching import eps_of
from lora_core.packing.packed_batch import current_pack

CHECKED_TOKENS = 16
ROUNDING = {torch.float32: (1e-5, 2**-20), torch.bfloat16: (2**-7, 2**-14)}
"""What sums in another order may change: a share of the element, and one of the largest of its row. A row is as large
as the terms that were added, and an element may be left over of terms that cancel each other: of the numbers of
SmolLM2's MLPs, up to 3,218, fp32 elements differ by 2**-21.5 of the largest of their row at most."""
MOST_ROUNDED_APART = 0.01
"""Of bf16 elements, from sums in another order; a norm that rounds elsewhere has a third."""

Forward = Callable[..., Tensor]


def faster_norms(model: nn.Module) -> list[tuple[nn.Module, Forward]]:
    """The norms of `model` that can be replaced, and the forward of each."""
    named = [(module, eps) for module in model.modules() if (eps := eps_of(module)) is not None]
    found = [(module, eps) for module, eps in named if runs_on(next(module.parameters()))]
    return [(module, partial(forward_norm, module, eps)) for module, eps in found if _agrees(module, eps)]


@torch.no_grad()
def _agrees(module: nn.Module, eps: float) -> bool:
    """Whether both give the same numbers, up to the order of a sum, for some like those of hidden states."""
    weight = next(module.parameters())
    numbers = torch.arange(CHECKED_TOKENS * weight.numel(), dtype=torch.float32)
    x_TD = (torch.sin(numbers * 0.7) * 2).view(1, CHECKED_TOKENS, -1).to(weight.dtype)
    return same_numbers(type(module).forward(module, x_TD), RmsNorm.apply(x_TD, weight, eps))


def same_numbers(theirs: Tensor, ours: Tensor) -> bool:
    """[..., D], equal but for the last bit, whatever their size: of any element in fp32, of hardly any in bf16."""
    of_element, of_row = ROUNDING[theirs.dtype]
    sizes = theirs.float().abs()
    allowed = of_element * sizes + of_row * sizes.amax(-1, keepdim=True)
    is_near = bool(((theirs.float() - ours.float()).abs() <= allowed).all())
    if theirs.dtype == torch.float32:
        return is_near
    return is_near and float((theirs != ours).float().mean()) <= MOST_ROUNDED_APART


def forward_norm(module: nn.Module, eps: float, x_TD: Tensor) -> Tensor:
    if current_pack() is None:
        return type(module).forward(module, x_TD)
    return RmsNorm.apply(x_TD, module.weight, eps)


class RmsNorm(torch.autograd.Function):
    """y = w · round(x / √(mean x² + eps)), in fp32 up to the rounding (arXiv 1910.07467); w is frozen."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_D: Tensor, eps: float):
        x_TD = x_TD.contiguous()
        y_TD, rate_T = torch.empty_like(x_TD), torch.empty(x_TD.numel() // len(weight_D))
        rms_norm(_rows(x_TD), array_of(weight_D), eps, _rows(y_TD), array_of(rate_T))
        ctx.save_for_backward(x_TD, rate_T)
        ctx.weight_D = weight_D
        return y_TD

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        x_TD, rate_T = ctx.saved_tensors
        return _gradient(x_TD, rate_T, ctx.weight_D, grad_outputs[0], None), None, None


class AddRmsNorm(torch.autograd.Function):
    """total = x + delta, or x itself without a delta, and its norm. Both go on from here, so that the gradients of the
    stream and of the norm are added in the pass that makes the latter."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float):
        x_TD = x_TD.contiguous()
        y_TD, rate_T = torch.empty_like(x_TD), torch.empty(x_TD.numel() // len(weight_D))
        weight, y, rate = array_of(weight_D), _rows(y_TD), array_of(rate_T)
        if delta_TD is None:
            total_TD = x_TD.view_as(x_TD)
            rms_norm(_rows(x_TD), weight, eps, y, rate)
        else:
            total_TD = torch.empty_like(x_TD)
            add_rms_norm(_rows(x_TD), _rows(delta_TD.contiguous()), weight, eps, _rows(total_TD), y, rate)
        ctx.save_for_backward(total_TD, rate_T)
        ctx.weight_D, ctx.has_delta = weight_D, delta_TD is not None
        return total_TD, y_TD

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        total_TD, rate_T = ctx.saved_tensors
        onward_TD, dy_TD = grad_outputs
        dx_TD = _gradient(total_TD, rate_T, ctx.weight_D, dy_TD, onward_TD)
        return dx_TD, dx_TD if ctx.has_delta else None, None, None


def _gradient(x_TD: Tensor, rate_T: Tensor, weight_D: Tensor, dy_TD: Tensor, onward_TD: Tensor | None) -> Tensor:
    """rate · (g - x̂ · mean(g · x̂)) with g = w · dy and x̂ = rate · x, plus `onward`."""
    dx_TD = torch.empty_like(x_TD)
    onward = _rows(x_TD)[:0] if onward_TD is None else _rows(onward_TD.contiguous())
    rows = _rows(x_TD), array_of(rate_T), array_of(weight_D), _rows(dy_TD.contiguous()), onward, _rows(dx_TD)
    rms_norm_backward(*rows)
    return dx_TD


def _rows(x_TD: Tensor):
    """[..., D] as the kernels take it: [T, D]."""
    return array_of(x_TD.view(-1, x_TD.shape[-1]))
