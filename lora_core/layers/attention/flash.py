# pyright: basic
"""Attention of all sequences of a pack in one launch on a GPU, by torch's variable-length FlashAttention kernel.

Each sequence attends to itself alone. tiled_gpu.py computes the cases that this kernel doesn't support: capped scores,
other head sizes, fp32. A CPU has code of its own. Shape suffixes: H query heads, K key heads, T tokens of the pack,
S sequences, E head features.
"""

from functools import cache
from typing import Any

from torch import Tensor

from lora_core.kernels.selection import VARLEN_DTYPES, AttentionHeads, varlen_parameters
from lora_core.packing.packed_batch import PackedBatch


def fits(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    """Return whether the kernel supports this kind of attention."""
    heads = AttentionHeads(size=query.shape[-1], is_capped=softcap is not None)
    return heads.fits_varlen and value.shape[-1] == heads.size and query.dtype in VARLEN_DTYPES


def attend_together(
    query: Tensor, key: Tensor, value: Tensor, pack: PackedBatch, *, scale: float, causal: bool, window: int | None
) -> Tensor:
    """Attend within each sequence: query [1, H, T, E], key and value [1, K, T, E] to [1, T, H, E]."""
    # Not part[0], whose backward fills a tensor with zeros and copies the gradient into it.
    q_THE, k_TKE, v_TKE = (part.squeeze(0).transpose(0, 1) for part in (query, key, value))
    longest = max(pack.sequence_lengths)
    attended = kernel()(
        q_THE,
        k_TKE,
        v_TKE,
        pack.sequence_bounds_S,
        pack.sequence_bounds_S,
        longest,
        longest,
        scale=scale,
        window_size=window_size(causal=causal, window=window, longest=longest),
        **({"enable_gqa": query.shape[1] != key.shape[1]} if _checks_heads() else {}),
    )
    return attended[None]


def kernel() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@cache
def _checks_heads() -> bool:
    """Return whether torch asks callers to allow fewer key heads than query heads. torch 2.11 does not ask."""
    return "enable_gqa" in varlen_parameters()


def window_size(*, causal: bool, window: int | None, longest: int) -> tuple[int, int]:
    """Return how many tokens before and after its own a query sees, -1 for all. `window` includes its own token."""
    if window is None or window >= longest:
        return (-1, 0) if causal else (-1, -1)
    return (window - 1, 0) if causal else (window - 1, window - 1)
