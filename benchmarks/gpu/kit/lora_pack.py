"""A pack of random adapters on one linear: what the Triton kernels compute, and the same in float64.

Shape suffixes: T tokens of the pack, t tokens of a segment, D input features, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from lora_core.kernels.gpu.tables import TileClass, class_of
from lora_core.kernels.gpu.trials import TrialSegment, run_of

GAP = 5
"""Rows between segments, which belong to no adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OfSegment:
    """Results that belong to one segment."""

    y: Tensor
    dx: Tensor
    da: Tensor
    db: Tensor

    def differences(self, reference: OfSegment) -> dict[str, float]:
        """Return the largest difference of each result, as a fraction of the reference's largest number."""
        found = {name: (getattr(self, name).double(), getattr(reference, name).double()) for name in self.__slots__}
        return {name: float((ours - theirs).abs().max() / theirs.abs().max()) for name, (ours, theirs) in found.items()}

    def equals(self, other: OfSegment) -> bool:
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in self.__slots__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraPack:
    """`y0_TO` and `x_TD` are what the kernels add to in the forward and the backward pass."""

    segments: list[TrialSegment]
    x_TD: Tensor
    dy_TO: Tensor
    y0_TO: Tensor

    def by_class(self) -> list[list[TrialSegment]]:
        return [list(members) for _, members in groupby(sorted(self.segments, key=kind_of), kind_of)]

    def alone(self, segment: TrialSegment) -> LoraPack:
        """Return a pack of one of the segments, whose rows begin at 0."""
        moved = replace(_with_new_gradients(segment), start=0, stop=segment.stop - segment.start)
        parts = (tensor[segment.rows].clone() for tensor in (self.x_TD, self.dy_TO, self.y0_TO))
        return LoraPack(segments=[moved], **dict(zip(("x_TD", "dy_TO", "y0_TO"), parts, strict=True)))

    def ruined(self, index: int) -> LoraPack:
        """Return the pack with NaN and infinity in all numbers of one segment."""
        segments = [_with_new_gradients(segment) for segment in self.segments]
        bad, x_TD, dy_TO = segments[index], self.x_TD.clone(), self.dy_TO.clone()
        x_TD[bad.rows], dy_TO[bad.rows] = torch.nan, torch.inf
        full = {"a_RD": torch.full_like(bad.a_RD, torch.inf), "b_OR": torch.full_like(bad.b_OR, torch.nan)}
        segments[index] = replace(bad, **full)
        return LoraPack(segments=segments, x_TD=x_TD, dy_TO=dy_TO, y0_TO=self.y0_TO)

    def computed(self) -> list[OfSegment]:
        """Return what the Triton kernels compute, by segment. The gradients start at zero."""
        y_TO, dx_TD = self.y0_TO.clone(), self.x_TD.clone()
        for segment in self.segments:
            segment.grad_a_RD.zero_()
            segment.grad_b_OR.zero_()
        runs = [run_of([members], self.x_TD.device) for members in self.by_class()]
        hidden = [run.add([y_TO], self.x_TD) for run in runs]
        for run, h_tW in zip(runs, hidden, strict=True):
            run.add_gradients(dx_TD, [self.dy_TO], self.x_TD, h_tW)
        return [
            OfSegment(y=y_TO[s.rows], dx=dx_TD[s.rows], da=s.grad_a_RD.clone(), db=s.grad_b_OR.clone())
            for s in self.segments
        ]

    def reference(self, dtype: torch.dtype = torch.float64) -> list[OfSegment]:
        """Return the same, computed by torch in `dtype`."""
        results: list[OfSegment] = []
        for part in self.segments:
            a_RD, b_OR, kept_tD = (tensor.to(dtype) for tensor in (part.a_RD, part.b_OR, part.kept_tD()))
            x_tD, dy_tO = self.x_TD[part.rows].to(dtype), self.dy_TO[part.rows].to(dtype)
            d_tD, dh_tR = x_tD * kept_tD, part.scale * dy_tO @ b_OR
            h_tR = part.scale * d_tD @ a_RD.T
            y_tO = self.y0_TO[part.rows].to(dtype) + h_tR @ b_OR.T
            results.append(OfSegment(y=y_tO, dx=x_tD + dh_tR @ a_RD * kept_tD, da=dh_tR.T @ d_tD, db=dy_tO.T @ h_tR))
        return results


def random_pack(
    ranks: Sequence[int],
    lengths: Sequence[int],
    *,
    features: int,
    dropout: float,
    dtype: torch.dtype,
    device: torch.device,
) -> LoraPack:
    """Return one segment for each rank and length, with gaps between them. Numbers are drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(rows, columns, device=device, generator=generator)).to(dtype)

    segments: list[TrialSegment] = []
    start = GAP
    for index, (rank, length) in enumerate(zip(ranks, lengths, strict=True)):
        segment = TrialSegment(
            start=start,
            stop=start + length,
            a_RD=drawn(rank, features, features**-0.5),
            b_OR=drawn(features, rank, rank**-0.5),
            grad_a_RD=torch.zeros(rank, features, device=device),
            grad_b_OR=torch.zeros(features, rank, device=device),
            scale=2.0,
            threshold=round(65536 * (1 - dropout)) if dropout else 0,
            key=(2**63 + index, 17),
        )
        segments.append(segment)
        start = segment.stop + GAP
    x_TD, dy_TO, y0_TO = (drawn(start, features) for _ in range(3))
    return LoraPack(segments=segments, x_TD=x_TD, dy_TO=dy_TO, y0_TO=y0_TO)


def kind_of(segment: TrialSegment) -> TileClass:
    return class_of(len(segment.a_RD), has_dropout=bool(segment.threshold))


def _with_new_gradients(segment: TrialSegment) -> TrialSegment:
    gradients = torch.zeros_like(segment.grad_a_RD), torch.zeros_like(segment.grad_b_OR)
    return replace(segment, grad_a_RD=gradients[0], grad_b_OR=gradients[1])
