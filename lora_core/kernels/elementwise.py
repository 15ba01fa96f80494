# pyright: basic
"""Compiled CPU kernels: gated activation, RMSNorm, rotary embedding and cross-entropy, each with its gradient."""

import numpy as np

from lora_core.kernels.numba_jit import (
    BLOCK,
    compiled,
    copied,
    exponential,
    in_order,
    inlined,
    narrowed,
    of_order,
    widened,
)


@compiled
def swiglu(gate, up, y):
    """y = round(round(silu(gate)) · up), over flat arrays."""
    for i in range(gate.size):
        g = widened(gate[i])
        silu = widened(narrowed(g / (np.float32(1) + exponential(-g)), y))
        y[i] = narrowed(silu * widened(up[i]), y)


@compiled
def swiglu_backward(gate, up, dy, dgate, dup):
    """Gradients of `swiglu`: silu'(g) = s · (1 + g · (1 - s)) with s the sigmoid of g."""
    for i in range(gate.size):
        g, d = widened(gate[i]), widened(dy[i])
        sigmoid = np.float32(1) / (np.float32(1) + exponential(-g))
        dup[i] = narrowed(d * widened(narrowed(g * sigmoid, dup)), dup)
        dsilu = widened(narrowed(d * widened(up[i]), dup))
        dgate[i] = narrowed(dsilu * (sigmoid * (np.float32(1) + g * (np.float32(1) - sigmoid))), dgate)


@compiled
def rms_norm(x, weight, eps, y, rate):
    """y = w · round(x · rate) [T, D], with rate = 1 / √(mean x² + eps), [T]."""
    for t in range(x.shape[0]):
        rate[t] = np.float32(1) / np.sqrt(_mean_square(x[t]) + np.float32(eps))
        _scaled(x[t], weight, rate[t], y[t])


@compiled
def add_rms_norm(x, delta, weight, eps, total, y, rate):
    """total = round(x + delta), and `rms_norm` of total."""
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
    """dx = onward + rate · (g - x̂ · mean(g · x̂)), with g = w · dy and x̂ = rate · x.

    An empty `onward` means that nothing is added.
    """
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


@compiled
def rotate(source, token_stride, head_stride, cos, sin, num_tokens, num_heads, size, backward, target):
    """Rotary embedding: target [T, H, E] is x · cos + rotate_half(x) · sin, or its transpose if `backward`.

    cos and sin are [T, D] with D ≤ E; the other features are copied. In `source`, head h of token t starts at
    t · token_stride + h · head_stride.
    """
    rotated = cos.size // num_tokens
    half, rest = np.uint64(rotated // 2), np.uint64(size - rotated)
    for t in range(num_tokens):
        angle = np.uint64(t * rotated)
        for h in range(num_heads):
            start, first = np.uint64(t * token_stride + h * head_stride), np.uint64((t * num_heads + h) * size)
            if backward:
                _rotate_pair_back(source, start, cos, sin, angle, half, target, first)
            else:
                _rotate_pair(source, start, cos, sin, angle, half, target, first)
            copied(source, start + half + half, target, first + half + half, rest)


@inlined
def _rotate_pair(x, start, cos, sin, angle, half, y, first):
    """Rotate one head. Products are rounded before they are added, as in torch."""
    for d in range(half):
        low, high = widened(x[start + d]), widened(x[start + half + d])
        cosine, sine = widened(cos[angle + d]), widened(sin[angle + d])
        y[first + d] = narrowed(widened(narrowed(low * cosine, y)) - widened(narrowed(high * sine, y)), y)
    for d in range(half):
        low, high = widened(x[start + d]), widened(x[start + half + d])
        cosine, sine = widened(cos[angle + half + d]), widened(sin[angle + half + d])
        y[first + half + d] = narrowed(widened(narrowed(high * cosine, y)) + widened(narrowed(low * sine, y)), y)


@inlined
def _rotate_pair_back(dy, start, cos, sin, angle, half, dx, first):
    for d in range(half):
        low, high = widened(dy[start + d]), widened(dy[start + half + d])
        dx[first + d] = narrowed(low * widened(cos[angle + d]) + high * widened(sin[angle + half + d]), dx)
    for d in range(half):
        low, high = widened(dy[start + d]), widened(dy[start + half + d])
        dx[first + half + d] = narrowed(high * widened(cos[angle + half + d]) - low * widened(sin[angle + d]), dx)


@compiled
def score_logits(logits, labels, smoothing, losses, correct, largest, sums):
    """Cross-entropy of each label [C] from its logits [C, V], and whether no logit exceeds the label's.

    `smoothing` [C] is the label smoothing, or empty. Also writes the largest logit and Σ e^(logit - largest), which the
    gradient needs.
    """
    num_classes = logits.shape[1]
    for c in range(logits.shape[0]):
        row = logits[c]
        most = _largest(row)
        total, whole = 0.0, 0.0
        for start in range(0, num_classes, BLOCK):
            total += _power_sum(row[start : start + BLOCK], most)
        if smoothing.size:
            for start in range(0, num_classes, BLOCK):
                whole += _plain_sum(row[start : start + BLOCK])
        largest[c], sums[c] = most, np.float32(total)
        own = widened(row[labels[c]])
        correct[c] = own >= most
        if smoothing.size and smoothing[c] > 0:
            own = (np.float32(1) - smoothing[c]) * own + smoothing[c] * np.float32(whole / num_classes)
        losses[c] = np.float32(np.log(total)) + most - own


@inlined
def _largest(row):
    most = in_order(widened(row[0]))
    for k in range(row.size):
        most = max(most, in_order(widened(row[k])))
    return of_order(most)


@inlined
def _power_sum(row, most):
    total = np.float32(0)
    for k in range(row.size):
        total += exponential(widened(row[k]) - most)
    return total


@inlined
def _plain_sum(row):
    total = np.float32(0)
    for k in range(row.size):
        total += widened(row[k])
    return total


@compiled
def logit_gradient(logits, labels, weights, smoothing, largest, sums):
    """Overwrite the logits [C, V] with the gradient: weight · (softmax - (1 - ε) onehot - ε / V)."""
    num_classes = logits.shape[1]
    for c in range(logits.shape[0]):
        row, most, factor = logits[c], largest[c], weights[c] / sums[c]
        epsilon = smoothing[c] if smoothing.size else np.float32(0)
        spread = weights[c] * epsilon / np.float32(num_classes)
        label = labels[c]
        own = exponential(widened(row[label]) - most) * factor - spread - weights[c] * (np.float32(1) - epsilon)
        _slopes(row, most, factor, spread)
        row[label] = narrowed(own, row)


@inlined
def _slopes(row, most, factor, spread):
    for k in range(row.size):
        row[k] = narrowed(exponential(widened(row[k]) - most) * factor - spread, row)
