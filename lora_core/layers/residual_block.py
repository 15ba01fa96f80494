# pyright: basic
"""A decoder block that fuses each residual sum with the norm that follows it, in forward and backward.

The block computes x + attention(norm(x)), then + mlp(norm(·)). It is recognized by its children and tested with
stand-ins for attention and MLP. Its `forward` is patched on the instance and used inside a pack. Shape suffixes:
T tokens, D features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_core.layers.module_matching import eps_of
from lora_core.layers.rms_norm import CHECKED_TOKENS, AddRmsNorm, same_numbers
from lora_core.packing.packed_batch import current_pack

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}

Forward = Callable[..., Any]


def faster_blocks(model: nn.Module, norms: Sequence[nn.Module]) -> list[tuple[nn.Module, Forward]]:
    """Return the blocks of `model` that can be patched, with their forward. `norms` are the norms that can."""
    known = set(map(id, norms))
    found = [module for module in model.modules() if _is_block(module, known)]
    return [(module, partial(forward_residual, module)) for module in found if _agrees(module)]


def has_norms_first(block: nn.Module) -> bool:
    """Return whether attention and MLP each read the output of a norm, by the names of the children."""
    return {name for name, _ in block.named_children()} == PARTS


def _is_block(module: nn.Module, norms: set[int]) -> bool:
    parts = dict(module.named_children())
    return has_norms_first(module) and {id(part) for name, part in parts.items() if name.endswith("norm")} <= norms


@torch.no_grad()
def _agrees(block: nn.Module) -> bool:
    weight = next(cast(nn.Module, block.input_layernorm).parameters())
    numbers = torch.arange(CHECKED_TOKENS * weight.numel(), dtype=torch.float32, device=weight.device)
    x_TD = torch.sin(numbers * 0.7).view(1, CHECKED_TOKENS, -1).to(weight.dtype)
    with _stand_ins(block):
        expected = type(block).forward(block, x_TD)
        return isinstance(expected, Tensor) and same_numbers(expected, _forward(block, x_TD))


@contextmanager
def _stand_ins(block: nn.Module) -> Iterator[None]:
    """Replace attention and MLP with simple functions that reveal where each is applied."""
    attention, mlp = cast(nn.Module, block.self_attn), cast(nn.Module, block.mlp)
    attention.forward = lambda hidden_states, *_args, **_options: (torch.flip(hidden_states, [-1]) / 2, None)
    mlp.forward = lambda x: torch.roll(x, 1, -1) / 4
    try:
        yield
    finally:
        del attention.forward, mlp.forward


def forward_residual(block: nn.Module, hidden_states: Tensor, *others: Any, **options: Any) -> Any:
    if current_pack() is None or others:  # positional arguments can't be assigned to the attention's parameters
        return type(block).forward(block, hidden_states, *others, **options)
    return _forward(block, hidden_states, **options)


def _forward(block: nn.Module, x_TD: Tensor, **options: Any) -> Tensor:
    before, between = (cast(nn.Module, norm) for norm in (block.input_layernorm, block.post_attention_layernorm))
    x_TD, y_TD = AddRmsNorm.apply(x_TD, None, before.weight, eps_of(before))
    attended_TD, _ = cast(nn.Module, block.self_attn)(hidden_states=y_TD, **options)
    x_TD, y_TD = AddRmsNorm.apply(x_TD, attended_TD, between.weight, eps_of(between))
    return x_TD + cast(nn.Module, block.mlp)(y_TD)
