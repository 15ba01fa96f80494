# pyright: basic
"""Attention of the newest token of each sequence to the keys and values in its cache, in generation.

One call of a compiled kernel computes all sequences: of kernels/generation.py on a CPU, of kernels/gpu/decoding.py on a
GPU. Shape suffixes: H query heads, K key heads, G = H / K, S tokens of a sequence, n sequences, E head features,
C attention calls of a pass.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lora_core.kernels import generation
from lora_core.kernels.gpu.visible_keys import VisibleKeys
from lora_core.kernels.kv_cache import SequenceCache
from lora_core.kernels.numba_jit import array_of, runs_on
from lora_core.layers.attention import tiled_gpu
from lora_core.layers.attention.dense_cpu import UNLIMITED
from lora_core.packing.packed_batch import current_kernels


def attend_newest(
    q_HnE: Tensor,
    k_KnE: Tensor,
    v_KnE: Tensor,
    caches: Sequence[SequenceCache],
    table_Cn4: Tensor | None = None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Append one key and value to each sequence's cache. Return the attention output [n, H, E] of the new tokens.

    `table_Cn4` has the caches' `addresses`, on a GPU whose kernel may be used.
    """
    heads = q_HnE, k_KnE, v_KnE
    if table_Cn4 is not None and tiled_gpu.takes(*heads, current_kernels().decoding_head_size):
        from lora_core.kernels.gpu import decoding

        visible = VisibleKeys(scale=scale, softcap=softcap or 0.0, before=(window or UNLIMITED) - 1, after=0)
        (call,) = {own.next_call() for own in caches}
        return decoding.attend_newest(heads, table_Cn4[call], visible)
    if not all(runs_on(tensor) and tensor.dtype == q_HnE.dtype for tensor in heads):
        options = {"scale": scale, "window": window, "softcap": softcap}
        parts = [part.split(1, dim=1) for part in heads]
        outputs = [
            attend_last(q_H1E, *own.extended(k_K1E, v_K1E), **options)
            for q_H1E, k_K1E, v_K1E, own in zip(*parts, caches, strict=True)
        ]
        return torch.cat(outputs, dim=1).transpose(0, 1)
    caches_n4 = np.empty((len(caches), 4), np.uint64)
    for row, own in enumerate(caches):
        keys, values = own.reserved(k_KnE[:, :1], v_KnE[:, :1])
        caches_n4[row] = keys.data_ptr(), values.data_ptr(), keys.shape[1], own.num_tokens + 1
    out_nHE = q_HnE.new_empty(q_HnE.shape[1], len(q_HnE), v_KnE.shape[2])
    generation.attend_rows(
        _flat(q_HnE),
        _flat(k_KnE),
        _flat(v_KnE),
        caches_n4,
        (len(q_HnE), len(k_KnE), q_HnE.shape[2], v_KnE.shape[2]),
        (scale, softcap or 0.0, UNLIMITED if window is None else window),
        array_of(out_nHE).reshape(-1),
    )
    return out_nHE


def _flat(heads_HnE: Tensor) -> np.ndarray:
    """Return the numbers as [n, H, E]."""
    return array_of(heads_HnE.transpose(0, 1).contiguous()).reshape(-1)


def attend_last(
    q_H1E: Tensor, k_KSE: Tensor, v_KSE: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Return the attention output [H, 1, E] of the last token over the last `window` tokens, or all if it is None."""
    if window is not None:
        k_KSE, v_KSE = k_KSE[:, -window:], v_KSE[:, -window:]
    q_KGE = q_H1E.reshape(len(k_KSE), -1, q_H1E.shape[2])
    scores_KGS = torch.bmm(q_KGE, k_KSE.transpose(1, 2)).float() * scale
    if softcap is not None:
        scores_KGS = torch.tanh(scores_KGS / softcap) * softcap
    weights_KGS = torch.softmax(scores_KGS, dim=-1).to(v_KSE.dtype)
    return torch.bmm(weights_KGS, v_KSE).reshape(len(q_H1E), 1, -1)
