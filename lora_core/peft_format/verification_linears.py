# pyright: basic
"""Compares what each adapted linear adds to its output in the engine (evidence) and in PEFT.

Over many layers a chaotic adapter magnifies rounding errors until the logits can't detect a halved matrix. A single
linear magnifies nothing: its addition for given inputs is determined up to a few units in the last place. Shape
suffixes: N inputs, D input features, O output features, R rank.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.base_model.patching import plain_weight
from lora_core.layers.lora_linear import Piece, add_lora
from lora_core.runtime.counter_rng import coin_flips

NUM_INPUTS = 2
PREFIX = "added."
"""Prefix of the module path in the tensor names of probe.safetensors."""
ROUNDING_FACTOR = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearsReport:
    """`worst_error` is the largest difference of a linear, divided by what rounding explains. The limit is 1."""

    num_linears: int
    worst_linear: str
    worst_error: float


def evidence(base: BaseModel, adapter: FlatAdapter) -> dict[str, Tensor]:
    """Return scale·B A x of each adapted linear as the engine computes it, [N, O] in the base model's dtype.

    With DoRA [2 N, O]: without, then with the magnitude, because normalization hides the scale of a large B A.
    """
    return {f"{PREFIX}{name}": _added_by_engine(base, adapter, name) for name in adapter.sites}


@torch.no_grad()
def _added_by_engine(base: BaseModel, adapter: FlatAdapter, name: str) -> Tensor:
    assert base.attachment is not None
    views, plain = adapter.sites[name], plain_weight(base.attachment.linears[name])
    x_ND = inputs(name, views.a_RD.shape[1]).to(base.device, base.dtype)
    parts = [replace(views, magnitude=None), *([views] if views.magnitude is not None else [])]
    added: list[Tensor] = []
    for part in parts:
        y_NO = torch.zeros(NUM_INPUTS, views.b_OR.shape[0], dtype=base.dtype, device=base.device)
        piece = Piece(start=0, stop=NUM_INPUTS, views=part, module=name, dropout=None)
        add_lora(y_NO, x_ND, (piece,), plain)
        added.append(y_NO)
    return torch.cat(added).cpu()


def shape_of(layer: Any) -> tuple[int, int]:
    """Return the shape of the evidence for one PEFT layer."""
    return NUM_INPUTS * (2 if any(layer.use_dora.values()) else 1), layer.out_features


def inputs(name: str, num_features: int) -> Tensor:
    """Return random inputs [N, D] of 1 and -1, which every dtype represents exactly. They differ between linears."""
    flips = coin_flips("linear", name, count=NUM_INPUTS * num_features, threshold=32768)
    return torch.from_numpy(flips).view(NUM_INPUTS, num_features).float() * 2 - 1


@torch.no_grad()
def compare(
    model: nn.Module, recorded: dict[str, Tensor], *, dtype: torch.dtype, more: dict[str, float]
) -> LinearsReport:
    """Compare PEFT's linears with the evidence.

    Args:
        model: The base model with PEFT's adapter in fp32.
        recorded: Evidence by module path, for exactly the adapted linears.
        more: Errors of other parts by name, such as a head.
    """
    from peft.tuners.lora import LoraLayer  # imported late: it takes a second, and training doesn't need it

    errors = {
        name: _error(layer, name, recorded[name], dtype=dtype)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    num_linears, errors = len(errors), errors | more
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    return LinearsReport(num_linears=num_linears, worst_linear=worst, worst_error=errors[worst])


def _error(layer: Any, name: str, recorded_NO: Tensor, *, dtype: torch.dtype) -> float:
    """Return the root mean square of the difference over the tolerance. NaN or infinite if either isn't finite."""
    (adapter,) = layer.lora_A.keys()
    lora_a, lora_b, scale = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
    x_ND = inputs(name, lora_a.weight.shape[1]).to(lora_a.weight.device, dtype)
    lengths_R = torch.linalg.vector_norm(lora_a.weight.float(), dim=1) * scale
    carried_O = torch.linalg.vector_norm(lora_b.weight.float() * lengths_R, dim=1)
    unit = torch.finfo(dtype).eps + math.sqrt(x_ND.shape[1]) * torch.finfo(torch.float32).eps
    recorded = recorded_NO.to(x_ND.device).float().split(NUM_INPUTS)
    with _without_base(layer):
        whole_NO = layer(x_ND).float()
    if not layer.use_dora.get(adapter):
        return _share(whole_NO - recorded[0], carried_O * unit)
    plain_NO = lora_b(lora_a(x_ND.to(lora_a.weight.dtype))).float() * scale
    magnified_O = carried_O * _dora_factor(layer, adapter).abs() + whole_NO.abs().amax(0)
    shares = _share(plain_NO - recorded[0], carried_O * unit), _share(whole_NO - recorded[1], magnified_O * unit)
    return math.nan if any(map(math.isnan, shares)) else max(shares)


def _share(difference_NO: Tensor, rounding_O: Tensor) -> float:
    """Return the difference divided by three rounding errors, each as a root mean square.

    A rounding error is one unit in the last place of h = scale·A x, propagated through B. The engine rounds h twice and
    the sum once, by at most half a unit each. Errors of the ranks are independent, so their squares add up. |h| is
    estimated by the norm of A's row, its root mean square over random signs. An fp32 sum of D numbers has an error of
    up to √D units. DoRA multiplies by c and rounds the result.
    """
    difference, tolerance = _rms(difference_NO), ROUNDING_FACTOR * _rms(rounding_O)
    if difference == 0:
        return 0.0
    return difference / tolerance if tolerance else math.inf


def _dora_factor(layer: Any, name: str) -> Tensor:
    """Return c = m / ‖W + scale·B A‖ [O], from PEFT's own norm. It is far below 1 if B A outgrew W."""
    dora, weight = layer.lora_magnitude_vector[name], layer.get_base_layer().weight.float()
    update_OD = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
    return dora.weight.float() / dora.get_weight_norm(weight, update_OD, layer.scaling[name])


@contextmanager
def _without_base(layer: Any) -> Iterator[None]:
    """Replace the frozen linear by zeros, so that the layer returns the adapter's addition, unrounded by W x."""
    frozen, num_out = layer.get_base_layer(), layer.out_features

    def zeros(x: Tensor, *_arguments: object, **_options: object) -> Tensor:
        return torch.zeros(*x.shape[:-1], num_out, dtype=x.dtype, device=x.device)

    frozen.forward = zeros
    try:
        yield
    finally:
        del frozen.forward


def _rms(numbers: Tensor) -> float:
    return float(numbers.square().mean().sqrt())
