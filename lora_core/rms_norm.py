# pyright: basic
"""RMSNorm with a backward written by hand, which takes half the time of the one that autograd derives on a CPU.

A norm is recognised by its class's name and parts and then asked: only where ours gives the numbers that the
library's forward gives is it replaced, on the instance. Letters: T tokens, D features.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

CHECKED_TOKENS = 16

Forward = Callable[[Tensor], Tensor]


def faster_norms(model: nn.Module) -> list[tuple[nn.Module, Forward]]:
    """The norms of `model` that can be replaced, and the forward of each."""
    found = [(module, eps) for module in model.modules() if (eps := eps_of(module)) is not None]
    return [(module, forward) for module, eps in found if _agrees(module, forward := partial(_norm, module, eps))]


def eps_of(module: nn.Module) -> float | None:
    """None for whatever isn't an RMSNorm with one weight."""
    if not type(module).__name__.endswith("RMSNorm") or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


@torch.no_grad()
def _agrees(module: nn.Module, forward: Forward) -> bool:
    """Whether both give the same bits for numbers like those of hidden states."""
    weight = next(module.parameters())
    numbers = torch.arange(CHECKED_TOKENS * weight.numel(), dtype=torch.float32, device=weight.device)
    x_TD = (torch.sin(numbers * 0.7) * 2).view(1, CHECKED_TOKENS, -1).to(weight.dtype)
    return weight.ndim == 1 and torch.equal(type(module).forward(module, x_TD), forward(x_TD))


def _norm(module: nn.Module, eps: float, x_TD: Tensor) -> Tensor:
    return RmsNorm.apply(x_TD, module.weight, eps)


class RmsNorm(torch.autograd.Function):
    """y = w · round(x / √(mean x² + eps)), in fp32 up to the rounding (arXiv 1910.07467); w is frozen."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_D: Tensor, eps: float):
        wide_TD = x_TD.float()
        rate_T1 = wide_TD.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, rate_T1)
        ctx.weight_D = weight_D
        normed_TD = wide_TD * rate_T1 if wide_TD is x_TD else wide_TD.mul_(rate_T1)
        return normed_TD.to(x_TD.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        """dx = r · (g - x̂ · mean(g · x̂)) with g = w · dy and x̂ = r · x."""
        x_TD, rate_T1 = ctx.saved_tensors
        g_TD = (grad_outputs[0] * ctx.weight_D).float()
        normed_TD = x_TD.float() * rate_T1
        mean_T1 = (g_TD * normed_TD).mean(-1, keepdim=True)
        dx_TD = g_TD.addcmul_(normed_TD, mean_T1, value=-1).mul_(rate_T1)
        return dx_TD.to(x_TD.dtype), None, None
