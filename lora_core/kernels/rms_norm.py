# pyright: basic
"""RMSNorm of rows (arXiv 1910.07467) and its gradient, for a CPU. Letters: T tokens, D features."""

import numpy as np

from lora_core.kernels.numba_jit import BLOCK, compiled, inlined, narrowed, widened


@compiled
def rms_norm(x, weight, eps, y, rate):
    """y = w · round(x · rate), rate = 1 / √(mean x² + eps): [T, D], and [T] of the rates."""
    for t in range(x.shape[0]):
        rate[t] = np.float32(1) / np.sqrt(_mean_square(x[t]) + np.float32(eps))
        _scaled(x[t], weight, rate[t], y[t])


@compiled
def add_rms_norm(x, delta, weight, eps, total, y, rate):
    """total = round(x + delta), and rms_norm of that."""
    for t in range(x.shape[0]):
        _add(x[t], delta[t], total[t])
        rate[t] = np.float32(1) / np.sqrt(_mean_square(total[t]) + np.float32(eps))
        _scaled(total[t], weight, rate[t], y[t])


@inlined
def _add(x, delta, total):
    for d in range(x.size):
        total[d] = narrowed(widened(x[d]) + widened(delta[d]), total)


@inlined
def _scaled(x, weight, rate, y):
    for d in range(x.size):
        y[d] = narrowed(widened(weight[d]) * widened(narrowed(widened(x[d]) * rate, y)), y)


@inlined
def _mean_square(x):
    total = 0.0
    for start in range(0, x.size, BLOCK):
        total += _square_sum(x[start : start + BLOCK])
    return np.float32(total / x.size)


@inlined
def _square_sum(x):
    total = np.float32(0)
    for d in range(x.size):
        total += widened(x[d]) * widened(x[d])
    return total


@compiled
def rms_norm_backward(x, rate, weight, dy, onward, dx):
    """dx = onward + rate · (g - x̂ · mean(g · x̂)), g = w · dy, x̂ = rate · x; `onward` is of no elements where nothing is
    added."""
    g, normed = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.float32)
    for t in range(x.shape[0]):
        _product(dy[t], weight, g)
        _normed(x[t], rate[t], normed)
        dot = 0.0
        for start in range(0, g.size, BLOCK):
            dot += _dot(g[start : start + BLOCK], normed[start : start + BLOCK])
        _norm_gradient(g, normed, np.float32(dot / g.size), rate[t], dx[t])
        if onward.size:
            _add(onward[t], dx[t], dx[t])


@inlined
def _product(dy, weight, g):
    for d in range(g.size):
        g[d] = widened(narrowed(widened(dy[d]) * widened(weight[d]), dy))


@inlined
def _normed(x, rate, normed):
    for d in range(normed.size):
        normed[d] = widened(x[d]) * rate


@inlined
def _dot(left, right):
    total = np.float32(0)
    for d in range(left.size):
        total += left[d] * right[d]
    return total


@inlined
def _norm_gradient(g, normed, mean, rate, dx):
    for d in range(g.size):
        dx[d] = narrowed(rate * (g[d] - normed[d] * mean), dx)
