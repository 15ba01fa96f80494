"""Packs of random adapters on one linear, and what the linear computes for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lora_core.adapter.flat_adapter import AdaptedModule, FlatAdapter
from lora_core.config import LoraConfig
from lora_core.layers.lora_linear import PackedDelta, PackedLinear, PlainWeight
from lora_core.layers.tiled_lora import SegmentedLora
from lora_core.packing.packed_batch import DropoutKey, SliceInput, build_pack

MODULE = "layer"
D, OUT = 96, 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One slice of a pack. Its numbers depend on `seed` alone."""

    seed: int
    num_tokens: int
    rank: int
    dropout: float = 0.0
    dora: bool = False
    adapts: bool = True

    def slice_input(self) -> SliceInput:
        lora = LoraConfig(rank=self.rank, alpha=2 + self.seed, use_dora=self.dora)
        target = AdaptedModule(name=MODULE, in_features=D, out_features=OUT)
        frozen = {MODULE: linear_weight()}
        targets = (target,) if self.adapts else ()
        adapter = FlatAdapter(targets, lora, dtype=torch.float32, device="cpu", frozen=frozen)
        adapter.p[:] = numbers(self.seed, adapter.num_parameters, 1)[:, 0]
        adapter.refresh_compute()
        key = DropoutKey(probability=self.dropout, seed=self.seed, step=3, slice_index=1)
        ids, mask = np.zeros(self.num_tokens, np.int32), np.zeros(self.num_tokens, np.uint8)
        return SliceInput(
            adapter=adapter, sequences=((ids, mask),), label_weight=0.0, dropout=key if self.dropout else None
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OfMember:
    """Rows of y and dx that belong to one member, and its gradient vector."""

    y_tO: Tensor
    dx_tD: Tensor
    gradient_N: Tensor

    def equals(self, other: OfMember) -> bool:
        parts = (self.y_tO, self.dx_tD, self.gradient_N), (other.y_tO, other.dx_tD, other.gradient_N)
        return all(map(torch.equal, *parts))

    def error(self, reference: OfMember) -> float:
        """Return the largest difference, as a fraction of the reference's largest number."""
        found, wanted = ((of.y_tO, of.dx_tD, of.gradient_N) for of in (self, reference))
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True) if b.numel())


def numbers(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def linear_weight() -> Tensor:
    return numbers(1000, OUT, D)


def computed(
    kernel: Literal["loop", "tiled"],
    members: list[Member],
    *,
    fused: bool = True,
    with_base: bool = True,
    ruined: int | None = None,
) -> list[OfMember]:
    """Return what the linear computes, by member. NaN and infinity ruin the numbers of one member.

    Without `with_base` the frozen weight is zero, so that the products of the kernels are all that is computed.
    """
    slices = [member.slice_input() for member in members]
    pack = build_pack(slices, device="cpu")
    T = pack.input_ids.shape[1]
    x_TD, dy_TO = torch.zeros(T, D), torch.zeros(T, OUT)
    for member, segment in zip(members, pack.segments, strict=True):
        rows = slice(segment.start, segment.stop)
        x_TD[rows] = numbers(member.seed + 1, member.num_tokens, D)
        dy_TO[rows] = numbers(member.seed + 2, member.num_tokens, OUT)
    if ruined is not None:
        rows = slice(pack.segments[ruined].start, pack.segments[ruined].stop)
        x_TD[rows], dy_TO[rows] = torch.nan, torch.inf
        slices[ruined].adapter.p[::2] = torch.inf
        slices[ruined].adapter.p[1::2] = torch.nan
    x_TD.requires_grad_()
    leaf = torch.zeros((), requires_grad=True)
    share = SegmentedLora(kernel, [MODULE]).divide((MODULE,), pack, x_TD.device)
    (pieces,) = share.pieces
    weight_OD = linear_weight() if with_base else torch.zeros(OUT, D)
    if fused:
        plain = PlainWeight(weight_OD=weight_OD, bias_O=None)
        y_TO = PackedLinear.apply(x_TD, leaf, plain, pieces, share.runs)
    else:
        y_TO = PackedDelta.apply(x_TD @ weight_OD.T, x_TD, leaf, pieces, share.runs)
    y_TO.backward(dy_TO)
    assert x_TD.grad is not None
    spans = [slice(segment.start, segment.stop) for segment in pack.segments]
    return [
        OfMember(y_tO=y_TO.detach()[rows], dx_tD=x_TD.grad[rows], gradient_N=part.adapter.g)
        for rows, part in zip(spans, slices, strict=True)
    ]
