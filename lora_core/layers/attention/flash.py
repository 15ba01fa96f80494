# pyright: basic
"""Attention of all sequences of a tick in one launch, for a GPU: torch's variable-length kernel (FlashAttention).

Each sequence attends to itself alone, as in attention.py, which computes what this can't: capped scores, other sizes
of a head, a CPU. Letters: H query heads, K key heads, T tokens of the tick, S sequences, E head features.
"""

from typing import Any

from torch import Tensor

from lora_core.kernels.selection import VARLEN_DTYPES
from lora_core.packing.packed_batch import PackedBatch

WIDEST_HEAD, HEAD_MULTIPLE = 256, 8


def fits(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    """Whether the kernel computes this kind of attention."""
    width = query.shape[-1]
    sized = width == value.shape[-1] and width <= WIDEST_HEAD and width % HEAD_MULTIPLE == 0
    return softcap is None and sized and query.dtype in VARLEN_DTYPES


def attend_together(
    query: Tensor, key: Tensor, value: Tensor, pack: PackedBatch, *, scale: float, causal: bool, window: int | None
) -> Tensor:
    """query [1, H, T, E], key and value [1, K, T, E] to [1, T, H, E]."""
    q_THE, k_TKE, v_TKE = (part[0].transpose(0, 1) for part in (query, key, value))
    longest = max(pack.sequence_lengths)
    together = kernel()(
        q_THE,
        k_TKE,
        v_TKE,
        pack.sequence_bounds_S,
        pack.sequence_bounds_S,
        longest,
        longest,
        scale=scale,
        window_size=window_size(causal=causal, window=window, longest=longest),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return together[None]


def kernel() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def window_size(*, causal: bool, window: int | None, longest: int) -> tuple[int, int]:
    """How many tokens before and after its own a query sees; -1 is all. A window of `window` counts its own as well."""
    if window is None or window >= longest:
        return (-1, 0) if causal else (-1, -1)
    return (window - 1, 0) if causal else (window - 1, window - 1)
