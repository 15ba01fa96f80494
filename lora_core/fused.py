# pyright: basic
"""RMSNorm and the gated activation for a GPU: forward and backward by hand, each compiled by torch into one kernel.

A part is recognised by its class and its own parts, and then asked, as in rms_norm.py: only where ours gives what the
library's forward gives, to the rounding, is it replaced, on the instance. A compiled kernel keeps fp32 where eager
operations round between them, so the bits differ. Letters: T tokens, D features, F of the gate.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.model_parts import eps_of, is_gated_mlp

Forward = Callable[[Tensor], Tensor]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
CHECKED_TOKENS = 16


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Once for each function; the number of tokens may change without compiling again."""
    return torch.compile(function, dynamic=True)


def why_not(device: torch.device) -> str | None:
    """What keeps torch from compiling for this device: it needs Triton, and a C compiler at run time."""
    try:
        compiled(swiglu)(*torch.ones(2, CHECKED_TOKENS, 8, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        told = str(error).strip().partition("\n")[0]
        return f"norms and gated activations run operation by operation: torch.compile failed ({told})"
    return None


def fused_parts(model: nn.Module) -> list[tuple[nn.Module, Forward]]:
    """The norms and gated feed-forward parts of `model` that can be replaced, and the forward of each."""
    found: list[tuple[nn.Module, Forward]] = []
    for module in model.modules():
        eps = eps_of(module)
        if eps is not None:
            found.append((module, partial(_norm, module, eps)))
        elif is_gated_mlp(module):
            found.append((module, partial(_feed_forward, module)))
    return [(module, forward) for module, forward in found if _agrees(module, forward)]


@torch.no_grad()
def _agrees(module: nn.Module, forward: Forward) -> bool:
    """Whether both give the same for numbers like those of hidden states."""
    first = getattr(module, "gate_proj", module)
    width, weight = getattr(first, "in_features", None), next(module.parameters())
    width = weight.shape[-1] if width is None else width
    numbers = torch.arange(CHECKED_TOKENS * width, dtype=torch.float32, device=weight.device)
    x_TD = (torch.sin(numbers * 0.7) * 2).view(1, CHECKED_TOKENS, -1)
    x_TD = x_TD.to(weight.dtype if weight.is_floating_point() else torch.bfloat16)
    expected = type(module).forward(module, x_TD)
    tolerance = TOLERANCE.get(expected.dtype, 0.0) * float(expected.abs().max())
    return bool((forward(x_TD) - expected).abs().max() <= tolerance)


def _norm(module: Any, eps: float, x_TD: Tensor) -> Tensor:
    return FusedNorm.apply(x_TD, module.weight, eps)


def _feed_forward(module: Any, x_TD: Tensor) -> Tensor:
    return module.down_proj(FusedSwiglu.apply(module.gate_proj(x_TD), module.up_proj(x_TD)))


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = w · x · rate with rate = 1 / √(mean x² + eps) (arXiv 1910.07467), and the rate, fp32 [T, 1]."""
    wide_TD = x_TD.float()
    rate_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return (wide_TD * rate_T1).to(x_TD.dtype) * weight_D, rate_T1


def rms_norm_backward(dy_TD: Tensor, x_TD: Tensor, rate_T1: Tensor, weight_D: Tensor) -> Tensor:
    """dx = rate · (g - x̂ · mean(g · x̂)) with g = w · dy and x̂ = rate · x."""
    g_TD, normed_TD = (dy_TD * weight_D).float(), x_TD.float() * rate_T1
    return ((g_TD - normed_TD * (g_TD * normed_TD).mean(-1, keepdim=True)) * rate_T1).to(x_TD.dtype)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) · up (arXiv 2002.05202)."""
    return F.silu(gate_TF) * up_TF


def swiglu_backward(dy_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """silu'(g) = s · (1 + g · (1 - s)) with s the sigmoid of g."""
    dy, gate, up = dy_TF.float(), gate_TF.float(), up_TF.float()
    sigmoid = torch.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return dgate.to(gate_TF.dtype), (dy * gate * sigmoid).to(up_TF.dtype)


class FusedNorm(torch.autograd.Function):
    """The weight is frozen."""

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
