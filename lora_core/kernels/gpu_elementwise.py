# pyright: basic
"""RMSNorm and gated activation with their gradients, which torch.compile turns into one GPU kernel each.

A compiled kernel keeps fp32 intermediates that eager operations would round, so the bits differ from eager mode.
Shape suffixes: T tokens, D features, F features of the gate.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHECKED_TOKENS = 16


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the compiled function, which is cached. Another number of tokens does not recompile it."""
    return torch.compile(function, dynamic=True)


def why_not(device: torch.device) -> str | None:
    """Return why torch.compile doesn't work on this device, or None. It needs Triton, and a C compiler at run time."""
    try:
        compiled(swiglu)(*torch.ones(2, CHECKED_TOKENS, 8, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        message = str(error).strip().partition("\n")[0]
        return f"norms and gated activations run operation by operation: torch.compile failed ({message})"
    return None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y = w · x · rate and rate = 1 / √(mean x² + eps), fp32 [T, 1] (RMSNorm, arXiv 1910.07467)."""
    wide_TD = x_TD.float()
    rate_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return (wide_TD * rate_T1).to(x_TD.dtype) * weight_D, rate_T1


def rms_norm_backward(dy_TD: Tensor, x_TD: Tensor, rate_T1: Tensor, weight_D: Tensor) -> Tensor:
    """Return dx = rate · (g - x̂ · mean(g · x̂)) with g = w · dy and x̂ = rate · x, [T, D] in the dtype of x."""
    g_TD, normed_TD = (dy_TD * weight_D).float(), x_TD.float() * rate_T1
    return ((g_TD - normed_TD * (g_TD * normed_TD).mean(-1, keepdim=True)) * rate_T1).to(x_TD.dtype)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Return silu(gate) · up (arXiv 2002.05202), [T, F]."""
    return F.silu(gate_TF) * up_TF


def swiglu_backward(dy_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dgate, dup), with silu'(g) = s · (1 + g · (1 - s)) and s the sigmoid of g."""
    dy, gate, up = dy_TF.float(), gate_TF.float(), up_TF.float()
    sigmoid = torch.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return dgate.to(gate_TF.dtype), (dy * gate * sigmoid).to(up_TF.dtype)
