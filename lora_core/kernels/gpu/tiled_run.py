# pyright: basic
"""The segments of one linear that the kernels of segmented_lora.py compute. Triton is imported at the first launch.

Shape suffixes: T tokens of the pack, t rows of the run, D input features, O output features, W padded rank.
"""

from dataclasses import dataclass

from torch import Tensor

from lora_core.kernels.gpu.tables import TileGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class TiledRun:
    """Segments of one class in one linear, whose entries are int64 [S · NUM_WORDS]."""

    entries: Tensor
    group: TileGroup

    def add(self, y_TO: Tensor, x_TD: Tensor) -> Tensor:
        """Compute y += scale·d(x) Aᵀ Bᵀ in place. Returns h = scale·d(x) Aᵀ, [t, W], for the backward."""
        from lora_core.kernels.gpu.segmented_lora import add_lora

        assert y_TO.is_contiguous()
        return add_lora(y_TO, x_TD.contiguous(), self.entries, self.group)

    def add_gradients(self, dx_TD: Tensor | None, dy_TO: Tensor, x_TD: Tensor, h_tW: Tensor) -> None:
        """Accumulate dA and dB into the adapters, and the LoRA part of dx in place, unless `dx_TD` is None."""
        from lora_core.kernels.gpu.segmented_lora import add_lora_gradients

        assert dy_TO.is_contiguous()
        assert dx_TD is None or dx_TD.is_contiguous()
        add_lora_gradients(dx_TD, dy_TO, x_TD.contiguous(), h_tW, self.entries, self.group)
