# pyright: basic
"""Compiled CPU kernels of attention: softmax over visible scores, its gradient, and gather and scatter of heads.

Letters: H query heads, K key heads, G = H / K, S tokens of a sequence, C = S rounded up to a multiple of COLUMNS,
R = S · G rows (those of one token are adjacent), E head features. Rows are short, and slicing one costs as much as
computing it. Arrays are therefore flat, and indices unsigned.
"""

import numpy as np

from lora_core.kernels.numba_jit import (
    compiled,
    copied,
    exponential,
    hyperbolic_tangent,
    in_order,
    inlined,
    narrowed,
    of_order,
    widened,
)

COLUMNS = 16
"""Number of columns to which rows of scores are padded, so that vector registers are filled."""


@compiled
def visible_softmax(scores, weights, num_rows, num_columns, num_groups, place, scale, softcap, causal, window):
    """Softmax over the keys that each row's token sees: weights [K, R, C], 0 elsewhere. May be in place of `scores`.

    The softmax is over scale · score, or with `softcap` > 0 over softcap · tanh(scale · score / softcap).
    `place` is (token of the first row, token of the first column, tokens in the sequence); the second is a multiple of
    COLUMNS. `window` is how many tokens a token sees to the left, including itself (without `causal` also to the
    right).
    """
    powers = np.empty(num_columns, np.float32)
    for row in range(scores.size // num_columns):
        first, last = _seen(row % num_rows // num_groups, place, causal, window)
        base = np.uint64(row * num_columns)
        start, stop = np.uint64(first // COLUMNS * COLUMNS), np.uint64(-(-last // COLUMNS) * COLUMNS)
        factors = np.float32(scale), np.float32(softcap)
        _softmax(scores, weights, base, powers, factors, start, np.uint64(first), np.uint64(last), stop)
        _fill(weights, base, base + start, 0)
        _fill(weights, base + stop, base + np.uint64(num_columns), 0)


@inlined
def _seen(row_token, place, causal, window):
    """Return the visible columns as (first, last + 1)."""
    first_token, first_key, num_tokens = place
    token = first_token + row_token
    last = token + 1 if causal else min(num_tokens, token + window)
    return max(0, token - window + 1) - first_key, last - first_key


@inlined
def _softmax(scores, weights, base, powers, factors, start, first, last, stop):
    """Compute columns [start, stop). Hidden columns among them become minus infinity."""
    scale, softcap = factors
    _fill(scores, base + start, base + first, -np.inf)
    _fill(scores, base + last, base + stop, -np.inf)
    most = _largest(scores, base + start, base + stop)
    if softcap > 0:
        _capped_powers(scores, base, powers, most, scale / softcap, softcap, start, stop)
        _fill(powers, start, first, 0)
        _fill(powers, last, stop, 0)
    else:
        _powers(scores, base, powers, most, scale, start, stop)
    _shares(powers, np.float32(1) / _sum(powers, start, stop), weights, base, start, stop)


@inlined
def _fill(numbers, start, stop, number):
    stored = narrowed(np.float32(number), numbers)
    for c in range(start, stop):
        numbers[c] = stored


@inlined
def _largest(scores, start, stop):
    most = in_order(widened(scores[start]))
    for c in range(start, stop):
        most = max(most, in_order(widened(scores[c])))
    return of_order(most)


@inlined
def _powers(scores, base, powers, most, scale, start, stop):
    for c in range(start, stop):
        powers[c] = exponential((widened(scores[base + c]) - most) * scale)


@inlined
def _capped_powers(scores, base, powers, most, inner, softcap, start, stop):
    """Use the largest score for the largest capped score, since tanh is monotonic."""
    highest = hyperbolic_tangent(most * inner)
    for c in range(start, stop):
        powers[c] = exponential((hyperbolic_tangent(widened(scores[base + c]) * inner) - highest) * softcap)


@inlined
def _sum(powers, start, stop):
    total = np.float32(0)
    for c in range(start, stop):
        total += powers[c]
    return total


@inlined
def _shares(powers, share, scores, base, start, stop):
    for c in range(start, stop):
        scores[base + c] = narrowed(powers[c] * share, scores)


@compiled
def score_gradient(scores, weights, slopes, num_rows, num_columns, num_groups, place, scale, softcap, causal, window):
    """Gradient of the softmax, in place of `slopes` [K, R, C]: scale · weight · (slope - Σ slope · weight).

    With a cap it is multiplied by 1 - tanh²(scale · score / softcap). `scores` are only read in that case, otherwise
    any array may be passed.
    """
    for row in range(weights.size // num_columns):
        first, last = _seen(row % num_rows // num_groups, place, causal, window)
        base = np.uint64(row * num_columns)
        start = base + np.uint64(first // COLUMNS * COLUMNS)
        stop, end = base + np.uint64(-(-last // COLUMNS) * COLUMNS), base + np.uint64(num_columns)
        mean = _dot(weights, slopes, start, stop)
        if softcap > 0:
            inner = np.float32(scale) / np.float32(softcap)
            _capped_gradient(scores, weights, slopes, mean, np.float32(scale), inner, start, stop)
        else:
            _gradient(weights, slopes, mean, np.float32(scale), start, stop)
        _fill(slopes, base, start, 0)
        _fill(slopes, stop, end, 0)


@inlined
def _dot(left, right, start, stop):
    total = np.float32(0)
    for c in range(start, stop):
        total += widened(left[c]) * widened(right[c])
    return total


@inlined
def _gradient(weights, slopes, mean, scale, start, stop):
    for c in range(start, stop):
        slopes[c] = narrowed(scale * widened(weights[c]) * (widened(slopes[c]) - mean), slopes)


@inlined
def _capped_gradient(scores, weights, slopes, mean, scale, inner, start, stop):
    for c in range(start, stop):
        capped = hyperbolic_tangent(widened(scores[c]) * inner)
        by_capped = widened(weights[c]) * (widened(slopes[c]) - mean)
        slopes[c] = narrowed(scale * by_capped * (np.float32(1) - capped * capped), slopes)


@compiled
def to_heads(source, first, token_stride, head_stride, num_tokens, num_rows, num_groups, size, heads):
    """Gather heads [K, rows, E]: row s · G + g of key head k is head k · G + g of token s. Rows beyond are zeros.

    In the flat `source`, head h of token s starts at first + s · token_stride + h · head_stride.
    """
    for row in range(heads.size // size):
        k, r = row // num_rows, row % num_rows
        s, h = r // num_groups, k * num_groups + r % num_groups
        start = np.uint64(row * size)
        if s < num_tokens:
            copied(source, np.uint64(first + s * token_stride + h * head_stride), heads, start, np.uint64(size))
        else:
            _fill(heads, start, start + np.uint64(size), 0)


@compiled
def from_heads(heads, num_rows, num_groups, size, target):
    """Scatter heads [K, rows, E] to `target` [S, H, E]. Rows beyond S · G are dropped."""
    num_key_heads = heads.size // size // num_rows
    for row in range(heads.size // size):
        k, r = row // num_rows, row % num_rows
        s, h = r // num_groups, k * num_groups + r % num_groups
        start = (s * num_key_heads * num_groups + h) * size
        if start < target.size:
            copied(heads, np.uint64(row * size), target, np.uint64(start), np.uint64(size))
