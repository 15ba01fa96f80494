# pyright: basic
"""RMSNorm, gated activation and rotation with their gradients, which torch.compile turns into one GPU kernel each.

A compiled kernel keeps fp32 intermediates that eager operations would round, so the bits differ from eager mode.
Shape suffixes: T tokens, D features, F features of the gate, H heads, E features of a head.
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


def rotate(x_1HTE: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
    """Return RoPE (arXiv 2104.09864) of the first D features x of each head: x · cos + (-x₂, x₁) · sin.

    x₁ and x₂ are the halves of x. The result is stored token by token, as attention and the projections read it.
    """
    first, second, cos, sin = _by_token(x_1HTE, cos_1TD, sin_1TD)
    half = first.shape[-1]
    low = first * cos[..., :half] - second * sin[..., :half]
    high = second * cos[..., half:] + first * sin[..., half:]
    return _by_head(low, high, x_1HTE)


def rotate_backward(dy_1HTE: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
    """Return dx of `rotate`, stored token by token."""
    low, high, cos, sin = _by_token(dy_1HTE, cos_1TD, sin_1TD)
    half = low.shape[-1]
    first = low * cos[..., :half] + high * sin[..., half:]
    second = high * cos[..., half:] - low * sin[..., :half]
    return _by_head(first, second, dy_1HTE)


def _by_token(x_1HTE: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return both halves of the rotated features, [1, T, H, D / 2], and the angles, [1, T, 1, D], all fp32."""
    first, second = x_1HTE.transpose(1, 2)[..., : cos_1TD.shape[-1]].float().chunk(2, dim=-1)
    return first, second, cos_1TD.float()[:, :, None], sin_1TD.float()[:, :, None]


def _by_head(first: Tensor, second: Tensor, x_1HTE: Tensor) -> Tensor:
    """Return both halves and the features that are not rotated."""
    rest = x_1HTE.transpose(1, 2)[..., 2 * first.shape[-1] :]
    return torch.cat([first.to(rest.dtype), second.to(rest.dtype), rest], dim=-1).transpose(1, 2)
