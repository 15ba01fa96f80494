# pyright: basic
"""RMSNorm in one memory pass each way, alone or fused with the residual sum before it.

A norm is recognized by its class name and parameters, and then tested. Its `forward` is patched on the instance, and
used inside a pack, only if the result equals that of the library's forward. Shape suffixes: T tokens, D features.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lora_core.kernels.on_device import has_kernels, kernels_of, memory_of
from lora_core.layers.module_matching import eps_of
from lora_core.layers.recomputed_inputs import is_recomputed_exactly, mark
from lora_core.packing.packed_batch import current_pack

CHECKED_TOKENS = 16
ROUNDING = {torch.float32: (1e-5, 2**-20), torch.bfloat16: (2**-7, 2**-14)}
"""Allowed differences from another summation order: relative to the element, and to the largest element of its row.

An element may be the remainder of terms that cancel, so the row's largest element bounds the rounding errors. On the
inputs of SmolLM2's MLPs, up to 3,218, fp32 elements differ by at most 2**-21.5 of their row's largest element."""
MOST_ROUNDED_APART = 0.01
"""Maximum fraction of bf16 elements that differ due to summation order. A norm that rounds elsewhere has a third."""

Forward = Callable[..., Tensor]


def faster_norms(model: nn.Module) -> list[tuple[nn.Module, Forward]]:
    """Return the norms of `model` that can be patched, each with its new forward."""
    named = [(module, eps) for module in model.modules() if (eps := eps_of(module)) is not None]
    found = [(module, eps) for module, eps in named if has_kernels(next(module.parameters()))]
    return [(module, partial(forward_norm, module, eps)) for module, eps in found if _agrees(module, eps)]


@torch.no_grad()
def _agrees(module: nn.Module, eps: float) -> bool:
    """Return whether both give the same numbers, up to summation order, on values like those of hidden states."""
    weight = next(module.parameters())
    numbers = torch.arange(CHECKED_TOKENS * weight.numel(), dtype=torch.float32, device=weight.device)
    x_TD = (torch.sin(numbers * 0.7) * 2).view(1, CHECKED_TOKENS, -1).to(weight.dtype)
    expected = type(module).forward(module, x_TD)
    with torch.enable_grad():
        y_TD = RmsNorm.apply(x_TD.requires_grad_(), weight, eps)
    return same_numbers(expected, y_TD.detach()) and is_recomputed_exactly(y_TD)


def same_numbers(expected: Tensor, actual: Tensor, *, num_rounded: int = 1) -> bool:
    """Return whether [..., D] tensors are equal up to the last bit: any element in fp32, few elements in bf16.

    `num_rounded` is the number of roundings in each element, one after the other.
    """
    of_element, of_row = ROUNDING[expected.dtype]
    sizes = expected.float().abs()
    allowed = num_rounded * of_element * sizes + of_row * sizes.amax(-1, keepdim=True)
    is_near = bool(((expected.float() - actual.float()).abs() <= allowed).all())
    if expected.dtype == torch.float32:
        return is_near
    return is_near and float((expected != actual).float().mean()) <= MOST_ROUNDED_APART


def forward_norm(module: nn.Module, eps: float, x_TD: Tensor) -> Tensor:
    if current_pack() is None:
        return type(module).forward(module, x_TD)
    return RmsNorm.apply(x_TD, module.weight, eps)


class RmsNorm(torch.autograd.Function):
    """y = w · round(x / √(mean x² + eps)), in fp32 up to the rounding (arXiv 1910.07467). w is frozen."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_D: Tensor, eps: float):
        x_TD = x_TD.contiguous()
        y_TD, rate_T = torch.empty_like(x_TD), _rates(x_TD)
        kernels_of(x_TD).rms_norm(_rows(x_TD), memory_of(weight_D), eps, _rows(y_TD), memory_of(rate_T))
        ctx.save_for_backward(x_TD, rate_T)
        ctx.weight_D = weight_D
        mark(ctx, y_TD, partial(_normed_with_rate, weight_D), x_TD, rate_T)
        return y_TD

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        x_TD, rate_T = ctx.saved_tensors
        return _gradient(x_TD, rate_T, ctx.weight_D, grad_outputs[0], None), None, None


class AddRmsNorm(torch.autograd.Function):
    """Returns total = x + delta (x itself without a delta) and its norm.

    Both outputs pass through this node, so that the backward adds the gradients of the residual stream and of the norm
    in one memory pass.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float):
        x_TD = x_TD.contiguous()
        y_TD, rate_T = torch.empty_like(x_TD), _rates(x_TD)
        weight, y, rate = memory_of(weight_D), _rows(y_TD), memory_of(rate_T)
        if delta_TD is None:
            total_TD = x_TD.view_as(x_TD)
            kernels_of(x_TD).rms_norm(_rows(x_TD), weight, eps, y, rate)
        else:
            total_TD = torch.empty_like(x_TD)
            parts = _rows(x_TD), _rows(delta_TD.contiguous()), weight, eps, _rows(total_TD), y, rate
            kernels_of(x_TD).add_rms_norm(*parts)
        ctx.save_for_backward(total_TD, rate_T)
        ctx.weight_D, ctx.has_delta = weight_D, delta_TD is not None
        mark(ctx, y_TD, partial(_normed_with_rate, weight_D), total_TD, rate_T)
        return total_TD, y_TD

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        total_TD, rate_T = ctx.saved_tensors
        onward_TD, dy_TD = grad_outputs
        dx_TD = _gradient(total_TD, rate_T, ctx.weight_D, dy_TD, onward_TD)
        return dx_TD, dx_TD if ctx.has_delta else None, None, None


def _normed_with_rate(weight_D: Tensor, x_TD: Tensor, rate_T: Tensor) -> Tensor:
    """Return the norm of x from its rate. Only a GPU has this kernel."""
    y_TD = torch.empty_like(x_TD)
    kernels_of(x_TD).rms_norm_with_rate(_rows(x_TD), memory_of(rate_T), memory_of(weight_D), _rows(y_TD))
    return y_TD


def _gradient(x_TD: Tensor, rate_T: Tensor, weight_D: Tensor, dy_TD: Tensor, onward_TD: Tensor | None) -> Tensor:
    """Return rate · (g - x̂ · mean(g · x̂)) with g = w · dy and x̂ = rate · x, plus `onward_TD` if it is not None."""
    dx_TD = torch.empty_like(x_TD)
    onward = _rows(x_TD)[:0] if onward_TD is None else _rows(onward_TD.contiguous())
    rows = _rows(x_TD), memory_of(rate_T), memory_of(weight_D), _rows(dy_TD.contiguous()), onward, _rows(dx_TD)
    kernels_of(x_TD).rms_norm_backward(*rows)
    return dx_TD


def _rows(x_TD: Tensor):
    """Return the memory of [..., D] as [T, D], for the kernels."""
    return memory_of(x_TD.view(-1, x_TD.shape[-1]))


def _rates(x_TD: Tensor) -> Tensor:
    return torch.empty(x_TD.numel() // x_TD.shape[-1], device=x_TD.device)
