# pyright: basic
"""The table of optimizer steps that optimizer.py reads. This module does not import Triton."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

ADDRESSES = ("p", "g", "m", "v", "compute")
STEP = np.dtype(
    [(name, "<i8") for name in (*ADDRESSES, "count", "plus_first", "plus_last")]
    + [(name, "<f8") for name in ("clip", "newest_m", "kept_v", "newest_v", "root", "eps")]
    + [(name, "<f8") for name in ("decay", "rate", "plus_decay", "plus_rate")]
)
"""One adapter's step. Elements plus_first to plus_last have the decay factor and the rate of LoRA+."""
NUM_WORDS = STEP.itemsize // 8
WORD = {name: position for position, name in enumerate(STEP.names or ())}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamwStep:
    """One AdamW step (arXiv 1711.05101, algorithm 2) of flat fp32 vectors [N], which are updated in place.

    Attributes:
        compute: bf16 copy of p, or None if passes read p.
        clip: Factor on the gradient, which is zeroed afterwards.
        step: Number of the step, from 1.
        plus: Elements with the learning rate `plus_rate` (LoRA+). The others have `rate`.
    """

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    compute: Tensor | None
    clip: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    rate: float
    plus: slice
    plus_rate: float

    @property
    def is_aligned(self) -> bool:
        return are_aligned(self.p, self.g, self.m, self.v, self.compute)

    def entry(self) -> tuple[float, ...]:
        """Return the fields of STEP."""
        unbiased = 1 - self.beta1**self.step
        return (
            *(vector.data_ptr() for vector in (self.p, self.g, self.m, self.v)),
            0 if self.compute is None else self.compute.data_ptr(),
            self.p.numel(),
            self.plus.start,
            self.plus.stop,
            self.clip,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            (1 - self.beta2**self.step) ** 0.5,
            self.eps,
            *(1 - self.rate * self.weight_decay, self.rate / unbiased),
            *(1 - self.plus_rate * self.weight_decay, self.plus_rate / unbiased),
        )


def are_aligned(*vectors: Tensor | None) -> bool:
    """Return whether vectors start at 16 bytes and have a multiple of 16 elements, so that loads are of 16 bytes."""
    return all(vector is None or (vector.data_ptr() % 16 == 0 and vector.numel() % 16 == 0) for vector in vectors)
