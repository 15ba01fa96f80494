# pyright: basic
"""Attention within each sequence of a pack, at the sequence's own length, so that packmates can't change its bits.

It is registered with transformers under one name and without a mask: the pack contains the bounds of sequences. Shape
suffixes: H query heads, K key heads, G = H / K, S tokens of a sequence, T tokens of the pack, E head features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from lora_core.errors import UnsupportedModel
from lora_core.layers.attention.cached import attend_newest
from lora_core.layers.attention.dense_cpu import UNLIMITED, Visibility, attend_by_matrices, serves
from lora_core.layers.attention.flash import attend_together, fits
from lora_core.layers.attention.tiled_cpu import Scoring, attend_in_strips
from lora_core.layers.attention.tiled_gpu import attend_in_tiles, takes
from lora_core.packing.packed_batch import PackedBatch, current_kernels, current_pack

NAME = "lora_core_packed"
LONGEST_MATRIX = 1024  # longer sequences: scores [H, S, S] would cost too much memory for the time they save


def register() -> None:
    """Register the attention function with transformers. Idempotent.

    It has no mask function: transformers then returns no mask at once. With one, it would look for packed sequences in
    the position ids first, which makes the host wait for the device in each pass.
    """
    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Map query [1, H, T, E], key and value [1, K, T, E] to [1, T, H, E], as transformers expects.

    Raises UnsupportedModel for attention sinks or a position bias.
    """
    assert attention_mask is None, "packed attention takes no mask"
    assert dropout == 0.0, "the base model is in evaluation mode"
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} has attention sinks or a position bias, which packing does not support.",
            remedy="Choose a base model with plain causal attention.",
        )
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    options = {"scale": scale, "causal": causal, "window": sliding_window, "softcap": softcap}
    pack = current_pack()
    if pack is None:  # an ordinary batch: each row is a sequence
        outputs = [attend(q, k, v, **options) for q, k, v in zip(query, key, value, strict=True)]
        return torch.stack(outputs).transpose(1, 2), None
    if pack.caches:
        return _attend_with_cache(query[0], key[0], value[0], pack, **options), None
    if current_kernels().attention == "varlen" and fits(query, value, softcap):
        return attend_together(query, key, value, pack, scale=scale, causal=causal, window=sliding_window), None
    if takes(query, key, value, current_kernels().tiled_head_size):
        return attend_in_tiles(query, key, value, pack, **options), None
    lengths = list(pack.sequence_lengths)
    if _by_matrices(query, key, value, softcap, max(lengths)):
        heads = query.squeeze(0), key.squeeze(0), value.squeeze(0)
        visibility = Visibility(
            lengths=pack.sequence_lengths, scale=scale, causal=causal, window=sliding_window or UNLIMITED
        )
        return attend_by_matrices(*heads, visibility)[None], None
    parts = zip(query[0].split(lengths, 1), key[0].split(lengths, 1), value[0].split(lengths, 1), strict=True)
    outputs = [attend(q, k, v, **options) for q, k, v in parts]
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


def _attend_with_cache(
    query: Tensor, key: Tensor, value: Tensor, pack: PackedBatch, *, causal: bool, **options: Any
) -> Tensor:
    """Return [1, T, H, E] in generation: within each sequence that has no cached keys yet, and for the newest token of
    the others."""
    heads = (query, key, value)
    output_THE = query.new_zeros(query.shape[1], query.shape[0], value.shape[2])  # 0 in the padding
    start = 0
    for length, cache in zip(pack.sequence_lengths, pack.caches, strict=False):
        rows = slice(start, start + length)
        start += length
        if cache.num_tokens == 0:
            q, k, v = (part[:, rows] for part in heads)
            k, v = cache.extended(k, v)
            output_THE[rows] = attend(q, k, v, causal=causal, **options).transpose(0, 1)
    rows_n = pack.newest_rows_n
    if rows_n is not None and len(rows_n):
        caches = [cache for cache in pack.caches if cache.num_tokens]
        q, k, v = (part.transpose(0, 1)[rows_n].transpose(0, 1) for part in heads)  # the kernels read them by token
        output_THE[rows_n] = attend_newest(q, k, v, caches, pack.addresses_Cn4, **options)
    return output_THE[None]


def attend(
    q_HSE: Tensor,
    k_KSE: Tensor,
    v_KSE: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend within one sequence: softmax(softcap · tanh(scale · q kᵀ / softcap)) v. Returns [H, S, E]."""
    num_tokens = q_HSE.shape[1]
    effective_window = UNLIMITED if window is None or window >= num_tokens else window
    if _by_matrices(q_HSE, k_KSE, v_KSE, softcap, num_tokens):
        visibility = Visibility(lengths=(num_tokens,), scale=scale, causal=causal, window=effective_window)
        return attend_by_matrices(q_HSE, k_KSE, v_KSE, visibility).transpose(0, 1)
    if effective_window == UNLIMITED and _is_fused(q_HSE, k_KSE, v_KSE, softcap):
        return _attend_fused(q_HSE, k_KSE, v_KSE, scale=scale, causal=causal)
    return attend_in_strips(
        q_HSE, k_KSE, v_KSE, Scoring(scale=scale, causal=causal, window=effective_window, softcap=softcap)
    )


def _by_matrices(query: Tensor, key: Tensor, value: Tensor, softcap: float | None, longest: int) -> bool:
    """Return whether dense_cpu.py computes sequences of up to `longest` tokens. Same choice as for each one alone."""
    return softcap is None and longest <= LONGEST_MATRIX and serves(query, key, value)


def _is_fused(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> bool:
    """Return whether torch has a fused kernel, which keeps no scores. Otherwise it would materialize them."""
    if query.device.type == "cpu":
        return softcap is None and serves(query, key, value) and query.shape[-1] == value.shape[-1]
    return fits(query, value, softcap)


def _attend_fused(q_HSE: Tensor, k_KSE: Tensor, v_KSE: Tensor, *, scale: float, causal: bool) -> Tensor:
    """Attend by torch's fused kernel. A window would need an [S, S] mask, kept for each layer until the backward."""
    return F.scaled_dot_product_attention(
        q_HSE[None],
        k_KSE[None],
        v_KSE[None],
        is_causal=causal,
        scale=scale,
        enable_gqa=q_HSE.shape[0] != k_KSE.shape[0],
    )[0]
