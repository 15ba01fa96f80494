# pyright: basic
"""Attention of one sequence by strips (chunks of queries), for capped scores and for long sequences.

Only queries, keys and values are kept for the backward, which recomputes the weights. Shape suffixes: H query heads,
K key heads, G = H / K, S tokens, C = S padded to a multiple of COLUMNS, B tokens of a strip, R = B · G rows of a key
head's queries (those of one token are adjacent), N keys that a strip sees, E head features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_core.kernels.attention import COLUMNS, score_gradient, visible_softmax
from lora_core.kernels.numba_jit import array_of, runs_on
from lora_core.layers.attention.dense_cpu import UNLIMITED

STRIP_NUMBERS = {"cpu": 1 << 21, "cuda": 1 << 24}
"""Maximum number of scores that exist at a time, by device type. Narrow windows may need twice as many, and a strip
takes several times this memory. A strip of COLUMNS tokens, the minimum, may exceed it if it sees many keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How a query scores a key (softcap · tanh(scale · q·k / softcap), or without a cap), and which keys it sees."""

    scale: float
    causal: bool
    window: int = UNLIMITED
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """Queries of the tokens [start, stop) of `num_tokens`, and the range [first, last) of keys that any of them sees.

    `first` and `last` are multiples of COLUMNS, so the range can include keys that no query sees.
    """

    start: int
    stop: int
    first: int
    last: int
    num_tokens: int
    scoring: Scoring

    @property
    def visible(self) -> slice:
        return slice(self.first, self.last)

    def rows(self, num_groups: int) -> slice:
        return slice(self.start * num_groups, self.stop * num_groups)

    def hidden(self, device: torch.device) -> Tensor:
        """Return bool [B, 1, N], True where a query must not see a key."""
        key_N = torch.arange(self.first, self.last, device=device)
        distance_BN = torch.arange(self.start, self.stop, device=device)[:, None] - key_N
        hidden_BN = distance_BN < 0 if self.scoring.causal else (key_N >= self.num_tokens).expand_as(distance_BN)
        return (hidden_BN | (distance_BN.abs() >= self.scoring.window))[:, None]


def attend_in_strips(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Attend within one sequence: query [H, S, E], key and value [K, S, E] to [H, S, E]."""
    return StripAttention.apply(query, key, value, scoring).transpose(0, 1)


def strips(num_tokens: int, num_heads: int, scoring: Scoring, device: torch.device) -> Iterator[Strip]:
    """Yield the strips. They depend on the sequence and the model alone, so packmates don't affect summation order."""
    reach = min(num_tokens, scoring.window)
    span = reach if scoring.causal else min(num_tokens, 2 * reach)
    numbers = STRIP_NUMBERS[device.type] // num_heads
    size = max(1, min(numbers // span, isqrt(numbers)) // COLUMNS) * COLUMNS
    for start in range(0, num_tokens, size):
        stop = min(num_tokens, start + size)
        first = max(0, start - reach + 1) // COLUMNS * COLUMNS
        last = _padded(stop if scoring.causal else min(num_tokens, stop + reach))
        yield Strip(start=start, stop=stop, first=first, last=last, num_tokens=num_tokens, scoring=scoring)


class StripAttention(torch.autograd.Function):
    """softmax(score) v as [S, H, E], with the softmax in fp32 or wider and rounded once."""

    @staticmethod
    def forward(ctx, q_HSE: Tensor, k_KSE: Tensor, v_KSE: Tensor, scoring: Scoring):
        (num_heads, num_tokens, _), num_key_heads = q_HSE.shape, len(k_KSE)
        q_KRE = _by_token(q_HSE, num_key_heads, num_tokens)
        k_KCE, v_KCE = (_by_token(part, num_key_heads, _padded(num_tokens)) for part in (k_KSE, v_KSE))
        ctx.scoring = scoring
        ctx.save_for_backward(q_KRE, k_KCE, v_KCE)
        out_SHE = q_HSE.new_empty(num_tokens, num_heads, v_KSE.shape[2])
        for strip in strips(num_tokens, num_heads, scoring, q_HSE.device):
            rows, visible = strip.rows(num_heads // num_key_heads), strip.visible
            scores_KRN = torch.bmm(q_KRE[:, rows], k_KCE[:, visible].transpose(1, 2))
            weights_KRN = _softmax(scores_KRN, scores_KRN, strip)
            _write(torch.bmm(weights_KRN, v_KCE[:, visible]), out_SHE[strip.start : strip.stop])
        return out_SHE

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor):
        """dC = P ∘ (dP - Σ dP ∘ P) with dP = dO vᵀ; dS = scale · dC ∘ (1 - tanh²); dQ = dS k, dK = dSᵀ q, dV = Pᵀ dO.

        Gradients of keys and values are summed over strips in fp32 or wider.
        """
        (grad_SHE,), (q_KRE, k_KCE, v_KCE) = grad_outputs, ctx.saved_tensors
        (num_tokens, num_heads, _), num_key_heads = grad_SHE.shape, len(k_KCE)
        dq_SHE = q_KRE.new_empty(num_tokens, num_heads, q_KRE.shape[2])
        dk_KCE, dv_KCE = (torch.zeros_like(part, dtype=_wide(part)) for part in (k_KCE, v_KCE))
        for strip in strips(num_tokens, num_heads, ctx.scoring, grad_SHE.device):
            visible, tokens = strip.visible, slice(strip.start, strip.stop)
            q, k_KNE = q_KRE[:, strip.rows(num_heads // num_key_heads)], k_KCE[:, visible]
            do_KRE = _by_token(grad_SHE[tokens].transpose(0, 1), num_key_heads, len(grad_SHE[tokens]))
            scores_KRN = torch.bmm(q, k_KNE.transpose(1, 2))
            weights_KRN = _softmax(scores_KRN, torch.empty_like(scores_KRN), strip)
            received_KRN = torch.bmm(do_KRE, v_KCE[:, visible].transpose(1, 2))
            ds_KRN = _gradient(scores_KRN, weights_KRN, received_KRN, strip)
            _write(torch.bmm(ds_KRN, k_KNE), dq_SHE[tokens])
            dk_KCE[:, visible] += torch.bmm(ds_KRN.transpose(1, 2), q)
            dv_KCE[:, visible] += torch.bmm(weights_KRN.transpose(1, 2), do_KRE)
        dk_KSE, dv_KSE = (part[:, :num_tokens].to(q_KRE.dtype) for part in (dk_KCE, dv_KCE))
        return dq_SHE.transpose(0, 1), dk_KSE, dv_KSE, None


def _softmax(scores_KRN: Tensor, weights_KRN: Tensor, strip: Strip) -> Tensor:
    """Write the softmax to `weights_KRN`, which may be `scores_KRN` itself, and return it."""
    if runs_on(scores_KRN):
        visible_softmax(_flat(scores_KRN), _flat(weights_KRN), *_for_kernels(scores_KRN, strip))
        return weights_KRN
    scoring, wide_KRN = strip.scoring, scores_KRN.to(_wide(scores_KRN))
    if scoring.softcap is None:
        wide_KRN = wide_KRN * scoring.scale
    else:
        wide_KRN = torch.tanh(wide_KRN * (scoring.scale / scoring.softcap)).mul_(scoring.softcap)
    num_key_heads, _, num_keys = scores_KRN.shape
    by_token_KBGN = wide_KRN.view(num_key_heads, strip.stop - strip.start, -1, num_keys)
    by_token_KBGN.masked_fill_(strip.hidden(scores_KRN.device), float("-inf"))
    return weights_KRN.copy_(torch.softmax(wide_KRN, dim=-1))


def _gradient(scores_KRN: Tensor, weights_KRN: Tensor, received_KRN: Tensor, strip: Strip) -> Tensor:
    """Return the gradient of the scores, in place of `received_KRN`, the gradient of the weights."""
    if runs_on(scores_KRN):
        arrays = _flat(scores_KRN), _flat(weights_KRN), _flat(received_KRN)
        score_gradient(*arrays, *_for_kernels(scores_KRN, strip))
        return received_KRN
    scoring, wide_KRN = strip.scoring, received_KRN.to(_wide(received_KRN))
    mean_KR1 = (weights_KRN * wide_KRN).sum(-1, keepdim=True)
    wide_KRN = (wide_KRN - mean_KR1).mul_(weights_KRN).mul_(scoring.scale)
    if scoring.softcap is not None:
        capped_KRN = torch.tanh(scores_KRN.to(wide_KRN.dtype) * (scoring.scale / scoring.softcap))
        wide_KRN.mul_(1 - capped_KRN.square())
    return received_KRN.copy_(wide_KRN)


def _for_kernels(scores_KRN: Tensor, strip: Strip) -> tuple[Any, ...]:
    _, num_rows, num_columns = scores_KRN.shape
    num_groups, scoring = num_rows // (strip.stop - strip.start), strip.scoring
    place = strip.start, strip.first, strip.num_tokens
    options = scoring.scale, scoring.softcap or 0.0, scoring.causal, scoring.window
    return num_rows, num_columns, num_groups, place, *options


def _flat(tensor: Tensor) -> Any:
    return array_of(tensor.view(-1))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, tensor.dtype)


def _padded(num_tokens: int) -> int:
    return -(-num_tokens // COLUMNS) * COLUMNS


def _by_token(heads_HSE: Tensor, num_key_heads: int, num_tokens: int) -> Tensor:
    """Return [K, tokens · G, E], zeros beyond S. A copy, so that its strides and alignment don't depend on the pack."""
    num_heads, length, size = heads_HSE.shape
    num_groups = num_heads // num_key_heads
    rows_KSGE = heads_HSE.new_empty(num_key_heads, num_tokens, num_groups, size)
    rows_KSGE[:, :length].copy_(heads_HSE.unflatten(0, (num_key_heads, num_groups)).transpose(1, 2))
    rows_KSGE[:, length:] = 0
    return rows_KSGE.flatten(1, 2)


def _write(heads_KRE: Tensor, rows_BHE: Tensor) -> None:
    """Write rows grouped by key head to `rows_BHE`, grouped by token."""
    (num_key_heads, _, size), num_tokens = heads_KRE.shape, len(rows_BHE)
    by_token_BKGE = heads_KRE.view(num_key_heads, num_tokens, -1, size).transpose(0, 1)
    rows_BHE.view(num_tokens, num_key_heads, -1, size).copy_(by_token_BKGE)
