# pyright: basic
"""Cross-entropy of labels by their logits, and its gradient in the logits' place. Letters: C labels, V classes."""

import numpy as np

from lora_core.kernels.numba_jit import BLOCK, compiled, exponential, in_order, inlined, narrowed, of_order, widened


@compiled
def score_logits(logits, labels, smoothing, losses, correct, largest, sums):
    """Cross-entropy of each label [C] by its logits [C, V], with `smoothing` [C] of its probability, or of no elements;
    whether the label is the likeliest; and the largest logit and Σ e^(logit - largest), for the gradient."""
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
    """In place of the logits [C, V]: weight · (softmax - (1 - ε) onehot - ε / V)."""
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
