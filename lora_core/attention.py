# pyright: basic
"""Attention within each sequence of a pack, at the sequence's own length, so packmates can't change a bit of it.

Letters: H query heads, K key heads, G = H / K, S tokens of a sequence, T of the tick, E head features.
Registered with transformers under one name, without a mask: the pack says where sequences begin.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from lora_core.errors import UnsupportedModel
from lora_core.pack import current_pack

NAME = "lora_core_packed"
LONGEST_MATRIX = 1024  # above, scores [H, S, S] cost more memory than they save time


def register() -> None:
    """Make the function known to transformers; idempotent."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args, **kwargs) -> None:
    return None


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
    """query [1, H, T, E], key and value [1, K, T, E] to [1, T, H, E], as transformers expects."""
    assert attention_mask is None and dropout == 0.0, "packed attention takes no mask and no dropout"
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise UnsupportedModel(
            "This model's attention has sinks or a position bias, which packing doesn't support.",
            remedy="Choose a base model with plain causal attention.",
        )
    pack = current_pack()
    lengths = list(pack.sequence_lengths) if pack is not None else [query.shape[2]]
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    parts = zip(query[0].split(lengths, 1), key[0].split(lengths, 1), value[0].split(lengths, 1), strict=True)
    outputs = [
        attend(q, k, v, scale=scale, causal=causal, window=sliding_window, softcap=softcap)
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


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
    """One sequence: softmax(scale · q kᵀ) v with softmax in fp32. Returns [H, S, E]."""
    num_tokens = q_HSE.shape[1]
    hidden_SS = hidden_pairs(num_tokens, causal=causal, window=window, device=q_HSE.device)
    if softcap is None and num_tokens > LONGEST_MATRIX:
        return _attend_fused(
            q_HSE, k_KSE, v_KSE, scale=scale, hidden_SS=hidden_SS, causal=causal, window=window
        )
    num_heads, num_groups = q_HSE.shape[0], q_HSE.shape[0] // k_KSE.shape[0]
    q_KGSE = q_HSE.reshape(
        k_KSE.shape[0], num_groups * num_tokens, -1
    )  # groups folded into rows: one GEMM a key head
    scores = (q_KGSE @ k_KSE.transpose(1, 2)).float().mul(scale).view(num_heads, num_tokens, num_tokens)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if hidden_SS is not None:
        scores = scores.masked_fill(hidden_SS, float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(q_HSE.dtype)
    return (weights.view(k_KSE.shape[0], num_groups * num_tokens, -1) @ v_KSE).view(num_heads, num_tokens, -1)


def hidden_pairs(num_tokens: int, *, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """True [S, S] where query i must not see key j: the future, or `window` or more tokens ago."""
    if not causal:
        return None
    position = torch.arange(num_tokens, device=device)
    distance_SS = position[:, None] - position[None]
    hidden_SS = distance_SS < 0
    if window is not None and window < num_tokens:
        hidden_SS |= distance_SS >= window
    return hidden_SS


def _attend_fused(q_HSE, k_KSE, v_KSE, *, scale, hidden_SS, causal, window) -> Tensor:
    windowed = causal and window is not None and window < q_HSE.shape[1]
    return F.scaled_dot_product_attention(
        q_HSE[None],
        k_KSE[None],
        v_KSE[None],
        attn_mask=~hidden_SS if windowed else None,
        is_causal=causal and not windowed,
        scale=scale,
        enable_gqa=q_HSE.shape[0] != k_KSE.shape[0],
    )[0]
