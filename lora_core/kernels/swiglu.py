# pyright: basic
"""The gated activation silu(gate) · up and its gradient, over flat arrays, for a CPU."""

import numpy as np

from lora_core.kernels.numba_jit import compiled, exponential, narrowed, widened


@compiled
def swiglu(gate, up, y):
    """y = round(round(silu(gate)) · up), flat."""
    for i in range(gate.size):
        g = widened(gate[i])
        silu = widened(narrowed(g / (np.float32(1) + exponential(-g)), y))
        y[i] = narrowed(silu * widened(up[i]), y)


@compiled
def swiglu_backward(gate, up, dy, dgate, dup):
    """silu'(g) = s · (1 + g · (1 - s)) with s the sigmoid of g."""
    for i in range(gate.size):
        g, d = widened(gate[i]), widened(dy[i])
        sigmoid = np.float32(1) / (np.float32(1) + exponential(-g))
        dup[i] = narrowed(d * widened(narrowed(g * sigmoid, dup)), dup)
        dsilu = widened(narrowed(d * widened(up[i]), dup))
        dgate[i] = narrowed(dsilu * (sigmoid * (np.float32(1) + g * (np.float32(1) - sigmoid))), dgate)
