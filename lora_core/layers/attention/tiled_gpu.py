# pyright: basic
"""Attention of all sequences of a pack by the Triton kernels of kernels/gpu/attention.py, for what flash.py refuses.

Shape suffixes: H query heads, K key heads, T tokens of the pack, E head features.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_core.kernels.gpu.visible_keys import TILED_HEADS, VisibleKeys
from lora_core.layers.attention.dense_cpu import UNLIMITED
from lora_core.packing.packed_batch import PackedBatch


def takes(query: Tensor, key: Tensor, value: Tensor, size: int | None) -> bool:
    """Return whether the kernels take these heads. `size`: of the heads that they were tried with, if at all."""
    heads = query, key, value
    is_tried = all(part.shape[-1] == size for part in heads)
    return is_tried and query.dtype in TILED_HEADS and all(part.dtype == query.dtype for part in heads)


def attend_in_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: PackedBatch,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend within each sequence: query [1, H, T, E], key and value [1, K, T, E] to [1, T, H, E].

    `window` is how many tokens a token sees to the left, itself included (without `causal` also to the right).
    """
    before = (window or UNLIMITED) - 1
    visible = VisibleKeys(scale=scale, softcap=softcap or 0.0, before=before, after=0 if causal else before)
    heads = (part.squeeze(0) for part in (query, key, value))
    return TiledAttention.apply((pack.sequence_bounds_S, max(pack.sequence_lengths), visible), *heads)[None]


class TiledAttention(torch.autograd.Function):
    """softmax(score) v as [T, H, E], which keeps q, k, v, its output and a number for each row."""

    @staticmethod
    def forward(ctx, sequences: tuple[Tensor, int, VisibleKeys], *given: Tensor):
        from lora_core.kernels.gpu.attention import attend

        heads = [part if part.stride(2) == 1 else part.contiguous() for part in given]
        bounds_S, ctx.longest, ctx.visible = sequences
        y_THE, logs_HT = attend(heads, bounds_S, ctx.longest, ctx.visible)
        ctx.save_for_backward(*heads, y_THE, logs_HT, bounds_S)
        return y_THE

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor):
        from lora_core.kernels.gpu.attention import attend_backward

        *heads, y_THE, logs_HT, bounds_S = ctx.saved_tensors
        dy_THE = grad_outputs[0].contiguous()
        made = attend_backward(dy_THE, heads, y_THE, logs_HT, bounds_S, ctx.longest, ctx.visible)
        return None, *(part.transpose(0, 1) for part in made)
