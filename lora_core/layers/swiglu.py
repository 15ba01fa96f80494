# pyright: basic
"""The gated MLP down(silu(gate(x)) · up(x)) (arXiv 2002.05202) with one memory pass for the activation each way.

An MLP is recognized by its children and tested, as norms are. Its `forward` is patched on the instance and used inside
a pack. Shape suffixes: T tokens, D features, F features of the gate.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.kernels.on_device import has_gpu_kernels, has_kernels, kernels_of, memory_of
from lora_core.layers.module_matching import is_gated_mlp, kind_of
from lora_core.layers.recomputed_inputs import mark
from lora_core.layers.rms_norm import CHECKED_TOKENS, same_numbers
from lora_core.packing.packed_batch import current_pack


def faster_mlps(model: nn.Module) -> list[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Return the MLPs of `model` that can be patched, with their forward.

    Only one MLP of each kind is tested, because a test reads all its weights.
    """
    found = [(module, kind_of(module)) for module in model.modules() if _is_replaceable(module)]
    agrees: dict[Hashable, bool] = {}
    for module, kind in found:
        if kind not in agrees:
            agrees[kind] = _agrees(module)
    return [(module, partial(forward_mlp, module)) for module, kind in found if agrees[kind]]


def _is_replaceable(module: nn.Module) -> bool:
    linears: list[Any] = [module.gate_proj, module.up_proj, module.down_proj] if is_gated_mlp(module) else []
    return bool(linears) and all(_is_readable(linear) or has_gpu_kernels(linear.weight) for linear in linears)


def _is_readable(linear: Any) -> bool:
    """Return whether a linear isn't quantized. On a CPU, only such MLPs are tested."""
    return type(linear) is nn.Linear and has_kernels(linear.weight)


@torch.no_grad()
def _agrees(module: nn.Module) -> bool:
    """Return whether both give the same numbers.

    The activations are compared before `down_proj`, which would spread one of them over a whole row. Two values are
    rounded in each, silu(gate) and the product.
    """
    gate, up, down = _linears(module)
    numbers = torch.arange(CHECKED_TOKENS * gate.in_features, dtype=torch.float32, device=gate.weight.device)
    dtype = gate.weight.dtype if gate.weight.is_floating_point() else torch.bfloat16
    x_TD = torch.sin(numbers * 0.7).view(1, CHECKED_TOKENS, -1).to(dtype)
    gate_TF, up_TF = gate(x_TD), up(x_TD)
    y_TF = cast(nn.Module, module.act_fn)(gate_TF) * up_TF
    is_same_form = same_numbers(type(module).forward(module, x_TD), down(y_TF))
    return is_same_form and same_numbers(y_TF, SwiGlu.apply(gate_TF, up_TF), num_rounded=2)


def forward_mlp(module: nn.Module, x_TD: Tensor) -> Tensor:
    return type(module).forward(module, x_TD) if current_pack() is None else _forward(module, x_TD)


def _forward(module: nn.Module, x_TD: Tensor) -> Tensor:
    gate, up, down = _linears(module)
    return down(SwiGlu.apply(gate(x_TD), up(x_TD)))


def _linears(module: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Return gate, up and down. Quantized ones have the attributes of nn.Linear too."""
    gate, up, down = (cast(nn.Linear, part) for part in (module.gate_proj, module.up_proj, module.down_proj))
    return gate, up, down


class SwiGlu(torch.autograd.Function):
    """y = round(round(silu(gate)) · up). Saves only gate and up for the backward."""

    @staticmethod
    def forward(ctx, gate_TF: Tensor, up_TF: Tensor):
        gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
        y_TF = _activated(gate_TF, up_TF)
        ctx.save_for_backward(gate_TF, up_TF)
        mark(ctx, y_TF, _activated, gate_TF, up_TF)
        return y_TF

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        gate_TF, up_TF = ctx.saved_tensors
        dgate_TF, dup_TF = torch.empty_like(gate_TF), torch.empty_like(up_TF)
        parts = gate_TF, up_TF, grad_outputs[0].contiguous(), dgate_TF, dup_TF
        kernels_of(gate_TF).swiglu_backward(*(memory_of(part.view(-1)) for part in parts))
        return dgate_TF, dup_TF


def _activated(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    y_TF = torch.empty_like(gate_TF)
    kernels_of(y_TF).swiglu(*(memory_of(part.view(-1)) for part in (gate_TF, up_TF, y_TF)))
    return y_TF
