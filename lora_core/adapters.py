# pyright: basic
"""One adapter as one flat row: every A and B of a job are views of four contiguous fp32 vectors.

Letters: N numbers of the row, R rank, D features in, O features out. Clip, AdamW, finite check, checkpoint
and eviction are each one operation on one vector, and rows of different jobs share no memory.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from lora_core.config import LoraConfig
from lora_core.counter_random import uniform


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A linear layer that an adapter changes; `name` is its module path in the base model."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteViews:
    """One adapted linear: weights in the compute dtype, gradients in fp32; all are views of the row."""

    a_RD: Tensor
    b_OR: Tensor
    grad_a_RD: Tensor
    grad_b_OR: Tensor
    scale: float


class AdapterRow:
    """The flat vectors of one job: p weights, g gradient, m and v the moments of AdamW (fp32 [N] each).

    `compute` holds p in the base model's dtype, which forward and backward read; it is p itself in fp32.
    """

    def __init__(self, targets: tuple[Target, ...], lora: LoraConfig, *, dtype: torch.dtype, device: str) -> None:
        self.targets = targets
        self.lora = lora
        sizes = [lora.rank * (target.in_features + target.out_features) for target in targets]
        self.arena = torch.zeros(4, sum(sizes), dtype=torch.float32, device=device)
        self.p, self.g, self.m, self.v = self.arena.unbind()
        self.compute = self.p if dtype == torch.float32 else torch.zeros_like(self.p, dtype=dtype)
        self.sites = {
            target.name: self._site(target, offset)
            for target, offset in zip(targets, accumulate(sizes, initial=0), strict=False)
        }

    def _site(self, target: Target, offset: int) -> SiteViews:
        a_RD, b_OR = self._matrices(self.compute, target, offset)
        grad_a_RD, grad_b_OR = self._matrices(self.g, target, offset)
        return SiteViews(a_RD=a_RD, b_OR=b_OR, grad_a_RD=grad_a_RD, grad_b_OR=grad_b_OR, scale=self.lora.scale)

    def _matrices(self, flat: Tensor, target: Target, offset: int) -> tuple[Tensor, Tensor]:
        rank = self.lora.rank
        middle = offset + rank * target.in_features
        stop = middle + rank * target.out_features
        return flat[offset:middle].view(rank, -1), flat[middle:stop].view(-1, rank)

    @property
    def num_parameters(self) -> int:
        return self.p.numel()

    @property
    def num_bytes(self) -> int:
        compute_bytes = 0 if self.compute is self.p else self.compute.nbytes
        return self.arena.nbytes + compute_bytes

    def initialise(self, seed: int) -> None:
        """A ~ Kaiming-uniform (a = √5), that is U(-1/√D, 1/√D), keyed by (seed, name); B = 0, as in PEFT."""
        self.arena.zero_()
        offset = 0
        for target in self.targets:
            count = self.lora.rank * target.in_features
            bound = target.in_features**-0.5
            numbers = (2 * uniform("lora_A", seed, target.name, count=count) - 1) * bound
            self.p[offset : offset + count] = torch.from_numpy(numbers.astype(np.float32))
            offset += count + self.lora.rank * target.out_features
        self.refresh_compute()

    def refresh_compute(self) -> None:
        """Round the weights to the compute dtype; call after every change of p."""
        if self.compute is not self.p:
            self.compute.copy_(self.p)
