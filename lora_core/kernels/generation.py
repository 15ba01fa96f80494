# pyright: basic
"""Compiled CPU kernels of generation, where each answer adds one row: LoRA of single rows, and attention to a cache.

A row is computed separately from start to end, so its bits depend on nothing else in the pass. torch's matmuls of a few
rows choose another summation order for each number of rows. Arrays are flat, as in attention.py.
"""

from typing import Any

import numpy as np

from lora_core.kernels.numba_jit import (
    compiled,
    copied,
    exponential,
    hyperbolic_tangent,
    inlined,
    intrinsic,
    narrowed,
    types,
    widened,
)


@intrinsic
def _memory_at(_context: Any, _address: Any = None, like: Any = None) -> Any:
    """Return a pointer to elements of the type of the array `like`, from an address as uint64."""
    pointer = types.CPointer(like.dtype)
    return pointer(types.uint64, like), lambda context, builder, signature, values: builder.inttoptr(
        values[0], context.get_value_type(signature.return_type)
    )


@compiled
def add_lora_rows(x, y, a, b, scale, rank, bias, factors):
    """Add scale·B A x to each row of y, in place: x [t, D], y [t, O], a [R, D], b [O, R].

    With DoRA, `factors` are c [O], and y = W x + bias becomes bias + c·(W x + scale·B A x). `factors` and `bias` are
    empty if there are none.
    """
    num_features, num_outputs = a.size // rank, b.size // rank
    inner = np.empty(rank, np.float32)
    for row in range(x.size // num_features):
        start, base = np.uint64(row * num_features), np.uint64(row * num_outputs)
        for r in range(rank):
            inner[r] = np.float32(scale) * _dot(x, start, a, np.uint64(r * num_features), np.uint64(num_features))
        for o in range(np.uint64(num_outputs)):
            total = np.float32(0)
            for r in range(np.uint64(rank)):
                total += inner[r] * widened(b[o * np.uint64(rank) + r])
            plain = widened(y[base + o])
            if factors.size:
                without_bias = plain - widened(bias[o]) if bias.size else plain
                total = (factors[o] - np.float32(1)) * without_bias + factors[o] * total
            y[base + o] = narrowed(plain + total, y)


@inlined
def _dot(left, left_start, right, right_start, count):
    total = np.float32(0)
    for e in range(count):
        total += widened(left[left_start + e]) * widened(right[right_start + e])
    return total


@compiled
def attend_rows(query, new_keys, new_values, caches, sizes, options, out):
    """Append a key and a value to the cache of each sequence, and attend from its new token to its last `window` ones.

    query [n, H, E], new_keys [n, K, E], new_values [n, K, V], out [n, H, V]. `caches` [n, 4], uint64: the address of
    keys [K, capacity, E] and of values [K, capacity, V], the capacity, and the number of tokens including the new one.
    `sizes` are (H, K, E, V), `options` (scale, softcap or 0, window). Scores, softmax and sums are in fp32.
    """
    num_heads, num_key_heads, key_size, value_size = sizes
    scores, sums = np.empty(np.int64(caches[:, 3].max()), np.float32), np.empty(value_size, np.float32)
    for row in range(len(caches)):
        keys, values = _memory_at(caches[row, 0], new_keys), _memory_at(caches[row, 1], new_values)
        capacity, num_tokens = np.int64(caches[row, 2]), np.int64(caches[row, 3])
        for key_head in range(num_key_heads):
            place, source = key_head * capacity + num_tokens - 1, row * num_key_heads + key_head
            copied(new_keys, source * key_size, keys, place * key_size, key_size)
            copied(new_values, source * value_size, values, place * value_size, value_size)
        first = max(np.int64(0), num_tokens - options[2])
        for head in range(num_heads):
            start = head // (num_heads // num_key_heads) * capacity
            place = row * num_heads + head
            _score(query, place * key_size, keys, start, (first, num_tokens, key_size), options, scores)
            _add_weighted(values, start, (first, num_tokens, value_size), scores, sums)
            for e in range(value_size):
                out[place * value_size + e] = narrowed(sums[e], out)


@inlined
def _score(query, query_start, keys, start, shape, options, scores):
    """Compute the scores of tokens [first, last)."""
    first, last, size = shape
    scale, softcap, _ = options
    for token in range(first, last):
        score = np.float32(scale) * _dot(query, query_start, keys, (start + token) * size, size)
        if softcap > 0:
            score = hyperbolic_tangent(score / np.float32(softcap)) * np.float32(softcap)
        scores[token] = score


@inlined
def _add_weighted(values, start, shape, scores, sums):
    """Replace scores by their softmax, and `sums` by the sum of the values of tokens [first, last) with these
    weights."""
    first, last, size = shape
    largest, total = np.float32(-np.inf), np.float32(0)
    for token in range(first, last):
        largest = max(largest, scores[token])
    for token in range(first, last):
        scores[token] = exponential(scores[token] - largest)
        total += scores[token]
    sums[:] = 0
    for token in range(first, last):
        weight, base = scores[token] / total, (start + token) * size
        for e in range(size):
            sums[e] += weight * widened(values[base + e])
