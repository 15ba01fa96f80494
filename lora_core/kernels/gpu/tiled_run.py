# pyright: basic
"""The segments of linears that the kernels of segmented_lora.py compute. Triton is imported at the first launch.

An import statement takes a microsecond each time, and each linear comes here twice in a tick: see `_kernels`.

Shape suffixes: T tokens of the pack, t rows of the run, D input features, O output features, W padded rank.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from torch import Tensor

from lora_core.kernels.gpu.tables import TileGroup

KERNELS = "lora_core.kernels.gpu.segmented_lora"


@dataclass(frozen=True, kw_only=True, slots=True)
class TiledRun:
    """Segments of one class in linears with the same input, whose entries are int64 [siblings, S · NUM_WORDS]."""

    entries: Tensor
    group: TileGroup

    def add(self, outputs: Sequence[Tensor], x_TD: Tensor) -> Tensor:
        """Compute y += scale·d(x) Aᵀ Bᵀ in place for the y [T, O] of each linear.

        Returns h = scale·d(x) Aᵀ, [t, W], for the backward.
        """
        _assert_contiguous(outputs)
        return _kernels().add_lora(outputs, x_TD.contiguous(), self.entries, self.group)

    def add_gradients(self, dx_TD: Tensor | None, gradients: Sequence[Tensor], x_TD: Tensor, h_tW: Tensor) -> None:
        """Accumulate dA and dB into the adapters, and the LoRA part of dx in place, unless `dx_TD` is None.

        `gradients` are the dy [T, O] of each linear.
        """
        _assert_contiguous(gradients)
        assert dx_TD is None or dx_TD.is_contiguous()
        _kernels().add_lora_gradients(dx_TD, gradients, x_TD.contiguous(), h_tW, self.entries, self.group)


def _kernels() -> ModuleType:
    return sys.modules.get(KERNELS) or import_module(KERNELS)


def _assert_contiguous(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        assert tensor.is_contiguous()
