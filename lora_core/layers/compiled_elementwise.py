# pyright: basic
"""RMSNorm, gated activation and rotation for a GPU, with a custom backward, each compiled by torch into one kernel.

A module is recognized by its class and children. Its `forward` is patched on the instance only if a trial gives the
library's result up to rounding, as in rms_norm.py. Shape suffixes: T tokens, D features, F features of the gate.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.kernels.gpu_elementwise import (
    CHECKED_TOKENS,
    compiled,
    rms_norm,
    rms_norm_backward,
    rotate,
    rotate_backward,
    swiglu,
    swiglu_backward,
)
from lora_core.layers.module_matching import eps_of, is_gated_mlp
from lora_core.packing.packed_batch import current_pack

Forward = Callable[[Tensor], Tensor]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def fused_parts(model: nn.Module) -> list[tuple[nn.Module, Forward]]:
    """Return the norms and gated MLPs of `model` that can be patched, each with its new forward."""
    found: list[tuple[nn.Module, Forward, Forward]] = []
    for module in model.modules():
        eps = eps_of(module)
        if eps is not None:
            found.append((module, partial(forward_norm, module, eps), partial(_norm, module, eps)))
        elif is_gated_mlp(module):
            found.append((module, partial(forward_mlp, module), partial(_feed_forward, module)))
    return [(module, forward) for module, forward, compiled_forward in found if _agrees(module, compiled_forward)]


@torch.no_grad()
def _agrees(module: nn.Module, compiled_forward: Forward) -> bool:
    """Return whether both forwards agree within TOLERANCE on values like those of hidden states."""
    first = getattr(module, "gate_proj", module)
    width, weight = getattr(first, "in_features", None), next(module.parameters())
    width = weight.shape[-1] if width is None else width
    numbers = torch.arange(CHECKED_TOKENS * width, dtype=torch.float32, device=weight.device)
    x_TD = (torch.sin(numbers * 0.7) * 2).view(1, CHECKED_TOKENS, -1)
    x_TD = x_TD.to(weight.dtype if weight.is_floating_point() else torch.bfloat16)
    expected = type(module).forward(module, x_TD)
    tolerance = TOLERANCE.get(expected.dtype, 0.0) * float(expected.abs().max())
    return bool((compiled_forward(x_TD) - expected).abs().max() <= tolerance)


def forward_norm(module: Any, eps: float, x_TD: Tensor) -> Tensor:
    """Run the library's forward outside a pack, and the compiled one inside."""
    return type(module).forward(module, x_TD) if current_pack() is None else _norm(module, eps, x_TD)


def forward_mlp(module: Any, x_TD: Tensor) -> Tensor:
    """Run the library's forward outside a pack, and the compiled one inside."""
    return type(module).forward(module, x_TD) if current_pack() is None else _feed_forward(module, x_TD)


def _norm(module: Any, eps: float, x_TD: Tensor) -> Tensor:
    return FusedNorm.apply(x_TD, module.weight, eps)


def _feed_forward(module: Any, x_TD: Tensor) -> Tensor:
    return module.down_proj(FusedSwiglu.apply(module.gate_proj(x_TD), module.up_proj(x_TD)))


class FusedNorm(torch.autograd.Function):
    """RMSNorm whose weight is frozen."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_D: Tensor, eps: float):
        y_TD, rate_T1 = compiled(rms_norm)(x_TD, weight_D, eps)
        ctx.save_for_backward(x_TD, rate_T1)
        ctx.weight_D = weight_D
        return y_TD

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        x_TD, rate_T1 = ctx.saved_tensors
        return compiled(rms_norm_backward)(grad_outputs[0], x_TD, rate_T1, ctx.weight_D), None, None


class FusedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_TF: Tensor, up_TF: Tensor):
        ctx.save_for_backward(gate_TF, up_TF)
        return compiled(swiglu)(gate_TF, up_TF)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        return compiled(swiglu_backward)(grad_outputs[0], *ctx.saved_tensors)


class FusedRotate(torch.autograd.Function):
    """Rotates query [1, H, T, E] and key [1, K, T, E] by cos and sin [1, T, D], which get no gradient (rotary.py)."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor):
        ctx.save_for_backward(cos, sin)
        return compiled(rotate)(query, cos, sin), compiled(rotate)(key, cos, sin)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        cos, sin = ctx.saved_tensors  # once: a checkpointed block recomputes them here
        query, key = (compiled(rotate_backward)(gradient, cos, sin) for gradient in grad_outputs)
        return query, key, None, None
