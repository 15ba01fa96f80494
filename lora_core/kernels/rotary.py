# pyright: basic
"""Rotary position embedding (arXiv 2104.09864) and its transpose, for a CPU.

Letters: T tokens, H heads, E features of a head, D of them rotated: feature d with d + D / 2. Arrays are flat, indices
unsigned, as in attention.py.
"""

import numpy as np

from lora_core.kernels.numba_jit import compiled, copied, inlined, narrowed, widened


@compiled
def rotate(source, token_stride, head_stride, cos, sin, num_tokens, num_heads, size, backward, target):
    """target [T, H, E]: x · cos + half-turned(x) · sin, by the transpose of that if `backward`; cos and sin are [T, D].

    `source` holds head h of token t from t · token_stride + h · head_stride on.
    """
    rotated = cos.size // num_tokens
    half, rest = np.uint64(rotated // 2), np.uint64(size - rotated)
    for t in range(num_tokens):
        angle = np.uint64(t * rotated)
        for h in range(num_heads):
            start, first = np.uint64(t * token_stride + h * head_stride), np.uint64((t * num_heads + h) * size)
            if backward:
                _turn_back(source, start, cos, sin, angle, half, target, first)
            else:
                _turn(source, start, cos, sin, angle, half, target, first)
            copied(source, start + half + half, target, first + half + half, rest)


@inlined
def _turn(x, start, cos, sin, angle, half, y, first):
    """Products are rounded before they are added, as torch does."""
    for d in range(half):
        low, high = widened(x[start + d]), widened(x[start + half + d])
        cosine, sine = widened(cos[angle + d]), widened(sin[angle + d])
        y[first + d] = narrowed(widened(narrowed(low * cosine, y)) - widened(narrowed(high * sine, y)), y)
    for d in range(half):
        low, high = widened(x[start + d]), widened(x[start + half + d])
        cosine, sine = widened(cos[angle + half + d]), widened(sin[angle + half + d])
        y[first + half + d] = narrowed(widened(narrowed(high * cosine, y)) + widened(narrowed(low * sine, y)), y)


@inlined
def _turn_back(dy, start, cos, sin, angle, half, dx, first):
    for d in range(half):
        low, high = widened(dy[start + d]), widened(dy[start + half + d])
        dx[first + d] = narrowed(low * widened(cos[angle + d]) + high * widened(sin[angle + half + d]), dx)
    for d in range(half):
        low, high = widened(dy[start + d]), widened(dy[start + half + d])
        dx[first + half + d] = narrowed(high * widened(cos[angle + half + d]) - low * widened(sin[angle + d]), dx)
