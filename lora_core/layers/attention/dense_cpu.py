# pyright: basic
"""Attention of all sequences of a pack on a CPU: dense score matrices, one sequence at a time so that they stay cached.

Shape suffixes: H query heads, K key heads, G = H / K, S tokens of a sequence, C = S padded to full vectors,
R = S · G rows of a key head's queries, T tokens of the pack, E head features. The computation for a sequence depends on
that sequence alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_core.kernels.attention import COLUMNS, from_heads, score_gradient, to_heads, visible_softmax
from lora_core.kernels.numba_jit import array_of, flat_memory, runs_on

LONGEST_KEPT = 256
"""Longest sequence whose softmax weights are kept until the backward; those of longer ones are recomputed. They take S
numbers per token and head, which for longer sequences is more than the linears keep."""
UNLIMITED = 1 << 30
"""Window that no sequence exceeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visibility:
    """Length of each sequence, scale of scores, and which tokens a token sees."""

    lengths: tuple[int, ...]
    scale: float
    causal: bool
    window: int = UNLIMITED


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Heads [H, T, E] and their memory as a flat array."""

    heads_HTE: Tensor
    numbers: np.ndarray

    def by_head(self, *, start: int, length: int, num_rows: int, num_groups: int = 1) -> Tensor:
        """Return [K, rows, E]: the G heads per key head of each token from `start` on. Zeros beyond `length` tokens."""
        num_heads, _, size = self.heads_HTE.shape
        head_stride, token_stride, _ = self.heads_HTE.stride()
        heads_KRE = self.heads_HTE.new_empty(num_heads // num_groups, num_rows, size)
        strides = token_stride, head_stride
        to_heads(self.numbers, start * token_stride, *strides, length, num_rows, num_groups, size, _flat(heads_KRE))
        return heads_KRE


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return all(runs_on(tensor) and tensor.dtype == query.dtype for tensor in (query, key, value))


def attend_by_matrices(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> Tensor:
    """Attend within each of the consecutive sequences: query [H, T, E], key and value [K, T, E] to [T, H, E]."""
    return MatrixAttention.apply(query, key, value, visibility)


class MatrixAttention(torch.autograd.Function):
    """softmax(scale · q kᵀ) v of each sequence, with the softmax in fp32 and rounded once.

    Saves the heads, and the weights of short sequences.
    """

    @staticmethod
    def forward(ctx, q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, visibility: Visibility):
        ctx.visibility = visibility
        out_THE = q_HTE.new_empty(q_HTE.shape[1], q_HTE.shape[0], v_KTE.shape[2])
        queries, keys, values = _rows_of(q_HTE), _rows_of(k_KTE), _rows_of(v_KTE)
        num_groups, start, saved = q_HTE.shape[0] // k_KTE.shape[0], 0, []
        for length in visibility.lengths:
            at, columns = {"start": start, "length": length}, -(-length // COLUMNS) * COLUMNS
            q_KRE = queries.by_head(**at, num_rows=length * num_groups, num_groups=num_groups)
            k_KCE, v_KCE = keys.by_head(**at, num_rows=columns), values.by_head(**at, num_rows=columns)
            weights_KRC = _weights(q_KRE, k_KCE, num_groups, visibility, length)
            _put(torch.bmm(weights_KRC, v_KCE), num_groups, out_THE[start : start + length])
            saved += [q_KRE, k_KCE, v_KCE, weights_KRC if length <= LONGEST_KEPT else None]
            start += length
        ctx.save_for_backward(*saved)
        return out_THE

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        """dS = scale · P ∘ (dP - Σ dP ∘ P) with dP = dO vᵀ; dQ = dS k, dK = dSᵀ q, dV = Pᵀ dO."""
        (grad_THE,), saved, start = grad_outputs, ctx.saved_tensors, 0
        num_tokens, num_heads, _ = grad_THE.shape
        num_groups = num_heads // len(saved[1])
        grads = [
            part.new_empty(num_tokens, heads, part.shape[2])
            for part, heads in zip(saved[:3], (num_heads, len(saved[1]), len(saved[1])), strict=True)
        ]
        received = _rows_of(grad_THE.transpose(0, 1))
        for index, length in enumerate(ctx.visibility.lengths):
            q_KRE, k_KCE, v_KCE, weights_KRC = saved[4 * index : 4 * index + 4]
            if weights_KRC is None:
                weights_KRC = _weights(q_KRE, k_KCE, num_groups, ctx.visibility, length)
            num_rows = length * num_groups
            do_KRE = received.by_head(start=start, length=length, num_rows=num_rows, num_groups=num_groups)
            ds_KRC = torch.bmm(do_KRE, v_KCE.transpose(1, 2))
            weights = _flat(weights_KRC)
            score_gradient(weights, weights, _flat(ds_KRC), *_shape(ds_KRC), num_groups, *_seen(ctx.visibility, length))
            dq_SHE, dk_SKE, dv_SKE = (grad[start : start + length] for grad in grads)
            _put(torch.bmm(ds_KRC, k_KCE), num_groups, dq_SHE)
            _put(torch.bmm(ds_KRC.transpose(1, 2), q_KRE), 1, dk_SKE)
            _put(torch.bmm(weights_KRC.transpose(1, 2), do_KRE), 1, dv_SKE)
            start += length
        return *(grad.transpose(0, 1) for grad in grads), None


def _weights(q_KRE: Tensor, k_KCE: Tensor, num_groups: int, visibility: Visibility, length: int) -> Tensor:
    """Return the softmax of scale · q kᵀ, [K, R, C], over the keys that each row sees."""
    weights_KRC = torch.bmm(q_KRE, k_KCE.transpose(1, 2))
    scores = _flat(weights_KRC)
    visible_softmax(scores, scores, *_shape(weights_KRC), num_groups, *_seen(visibility, length))
    return weights_KRC


def _rows_of(x_HTE: Tensor) -> Rows:
    heads_HTE, numbers = flat_memory(x_HTE)
    return Rows(heads_HTE=heads_HTE, numbers=numbers)


def _flat(tensor: Tensor) -> np.ndarray:
    return array_of(tensor.view(-1))


def _shape(scores_KRC: Tensor) -> tuple[int, int]:
    return scores_KRC.shape[1], scores_KRC.shape[2]


def _seen(visibility: Visibility, length: int) -> tuple[tuple[int, int, int], float, float, bool, int]:
    return (0, 0, length), visibility.scale, 0.0, visibility.causal, visibility.window


def _put(heads_KRE: Tensor, num_groups: int, rows_SHE: Tensor) -> None:
    """Write rows grouped by head to `rows_SHE`, grouped by token."""
    from_heads(_flat(heads_KRE), heads_KRE.shape[1], num_groups, heads_KRE.shape[2], _flat(rows_SHE))
