# pyright: strict
"""The arguments of the attention kernels that select keys. This module does not import Triton."""

from dataclasses import dataclass

import torch

TILED_HEADS = {torch.bfloat16: 256, torch.float32: 128}
"""Most features of a head in attention.py, by dtype. Wider heads in fp32 would spill registers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisibleKeys:
    """How queries score keys, and which ones they see: `before` and `after` tokens around their own.

    A `softcap` of 0 stands for none.
    """

    scale: float
    softcap: float
    before: int
    after: int

    @property
    def numbers(self) -> tuple[float, float, float, int, int]:
        """Return the arguments of the kernels. The first is the factor of q kᵀ inside of tanh."""
        inner = self.scale / self.softcap if self.softcap else self.scale
        return inner, self.scale, self.softcap, self.before, self.after
