# pyright: basic
"""Builds the pointer table for the GPU kernels: addresses of each adapted layer's weights and gradients."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_core.adapter.flat_adapter import FlatAdapter


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteLayout:
    """Layout of an adapter's N linears, in the order of its targets. It is the same for all its replicas.

    Attributes:
        offsets: int64 [N, 4]: bytes from the start of the weights to A and B, and from that of g to dA and dB.
        ranks, trained: int64 [N]: ranks of the weights and of the gradients.
        scales: float64 [N].
        shapes: int64 [N, 2]: input and output features.
    """

    modules: tuple[str, ...]
    offsets: NDArray[np.int64]
    ranks: NDArray[np.int64]
    trained: NDArray[np.int64]
    scales: NDArray[np.float64]
    shapes: NDArray[np.int64]


def site_layout(adapter: FlatAdapter) -> SiteLayout:
    times = 2 if adapter.lora.subtracts_start else 1
    spans = list(adapter.spans.values())
    starts = np.array([(span.a.start, span.b.start) for span in spans], np.int64).reshape(-1, 2)
    trained = np.array([span.rank for span in spans], np.int64)
    return SiteLayout(
        modules=tuple(adapter.spans),
        offsets=np.concatenate([starts * times * adapter.compute.itemsize, starts * adapter.g.itemsize], axis=1),
        ranks=times * trained,
        trained=trained,
        scales=np.array([adapter.lora.scale_of(name) for name in adapter.spans], np.float64),
        shapes=np.array([(t.in_features, t.out_features) for t in adapter.targets], np.int64).reshape(-1, 2),
    )


def addresses_of(adapter: FlatAdapter, layout: SiteLayout) -> NDArray[np.int64]:
    """Return the addresses of A, B, dA and dB of each linear, int64 [N, 4]."""
    weights = adapter.paired if adapter.lora.subtracts_start else adapter.compute
    origins = np.array([weights.data_ptr(), adapter.g.data_ptr()], np.int64)
    return layout.offsets + origins.repeat(2)
