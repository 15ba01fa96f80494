# pyright: basic
"""LongRoPE (arXiv 2402.13753) in packs: rotary frequencies by the length of each sequence.

transformers selects short or long factors by the largest position of a whole pass, and writes the selection to the
module. In a pack the longest packmate would decide, and lanes would write concurrently. The patched `forward` therefore
reads two copies, which transformers has set up for either length, and writes nothing. Shape suffixes: T tokens,
S sequences.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.packing.packed_batch import PackedBatch, current_pack

NAME, BOUND = "longrope", "original_max_position_embeddings"

Bounds = Mapping[str | None, int]
"""Length of the longest sequence with short factors, by layer type (None for a module without layer types)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """Copies of a rotary module, as transformers leaves it after a short and after a long sequence."""

    bounds: Bounds
    short: nn.Module
    long: nn.Module


def rotations_by_length(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Return the rotary modules of `model` that select factors by length, each with its patched forward."""
    found = [(module, bounds) for module in model.modules() if (bounds := _bounds_of(module))]
    return [(module, partial(forward_rotary, module, _factors_of(module, bounds))) for module, bounds in found]


def bounds_in(model: nn.Module) -> frozenset[int]:
    """Return the lengths beyond which all tokens of a sequence use other factors."""
    return frozenset(bound for module in model.modules() for bound in _bounds_of(module).values())


def _bounds_of(module: nn.Module) -> Bounds:
    kinds: Any = getattr(module, "rope_type", None)
    parameters: Any = getattr(getattr(module, "config", None), "rope_parameters", None)
    if isinstance(kinds, dict):
        return {layer: parameters[layer][BOUND] for layer, kind in kinds.items() if kind == NAME}
    return {None: parameters[BOUND]} if kinds == NAME else {}


def _factors_of(module: nn.Module, bounds: Bounds) -> Factors:
    return Factors(bounds=bounds, short=_set_up(module, bounds, excess=0), long=_set_up(module, bounds, excess=1))


@torch.no_grad()
def _set_up(module: nn.Module, bounds: Bounds, *, excess: int) -> nn.Module:
    """Return a copy after a pass over a sequence that is `excess` tokens longer than the bound."""
    copied = copy.deepcopy(module)
    like = next(copied.buffers()).new_zeros(1)
    for layer, bound in bounds.items():
        last = torch.full((1, 1), bound + excess - 1, device=like.device)
        type(copied).forward(copied, like, last, **_of_layer(layer))
    return copied


def _of_layer(layer_type: str | None) -> dict[str, str]:
    """Return the argument for the layer type, which families with a single layer type don't accept."""
    return {} if layer_type is None else {"layer_type": layer_type}


def forward_rotary(
    module: nn.Module, factors: Factors, x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> Any:
    """Return cosines and sines [1, T, ...], or the family's equivalent."""
    pack, options = current_pack(), _of_layer(layer_type)
    if pack is None or layer_type not in factors.bounds:
        return type(module).forward(module, x, position_ids, **options)
    own = inspect.unwrap(type(module).forward)  # without the decorator that selects and writes
    is_long_S = [length > factors.bounds[layer_type] for length in pack.whole_lengths]
    if not any(is_long_S):
        return own(factors.short, x, position_ids, **options)
    long = own(factors.long, x, position_ids, **options)
    if all(is_long_S):
        return long
    short, is_long_T = own(factors.short, x, position_ids, **options), _by_token(pack, is_long_S, x.device)
    if isinstance(long, Tensor):
        return _select(is_long_T, long, short)
    return tuple(_select(is_long_T, *pair) for pair in zip(long, short, strict=True))


def _by_token(pack: PackedBatch, is_long_S: list[bool], device: torch.device) -> Tensor:
    lengths_S = torch.tensor(pack.sequence_lengths)
    return torch.tensor(is_long_S).repeat_interleave(lengths_S).to(device)


def _select(is_long_T: Tensor, long: Tensor, short: Tensor) -> Tensor:
    return torch.where(is_long_T.view(1, -1, *[1] * (long.ndim - 2)), long, short)
