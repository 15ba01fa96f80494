# pyright: basic
"""Forward and backward of one job in one linear with DoRA (arXiv 2402.09353), which trains the norm of each row of W.

y = b + c·(W x + scale·B A x), with c = m / ‖W + scale·B A‖ for each output. The gradient treats the norm as a
constant (section 4.3). The adapter computes it once per step. As in PEFT, dropout applies to everything that training
changes: y = b + W x + (c - 1)·W d + c·scale·B A d, with d = dropout(x). Shape suffixes as in lora_linear.py.
"""

import torch.nn.functional as F
from torch import Tensor

from lora_core.adapter.flat_adapter import MagnitudeViews, SiteViews


def add_magnitude(
    y_tO: Tensor,
    d_tD: Tensor,
    h_tR: Tensor,
    views: SiteViews,
    *,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    with_dropout: bool,
) -> Tensor:
    """Turn y = W x + b [t, O] into the output of the adapted linear, in place. `h_tR` is scale·d Aᵀ.

    While nothing is trained yet, c is 1 and y doesn't change. Returns v = W d + scale·B A d [t, O] for the backward.
    """
    assert views.magnitude is not None
    c_O = views.magnitude.factor_O
    without_bias_tO = y_tO if bias_O is None else y_tO - bias_O
    base_tO = F.linear(d_tD, weight_OD) if with_dropout else without_bias_tO
    lora_tO = h_tR @ views.b_OR.T
    v_tO = base_tO + lora_tO
    y_tO.copy_(y_tO + (c_O - 1) * base_tO + c_O * lora_tO)
    return v_tO


def add_magnitude_gradient(dy_tO: Tensor, v_tO: Tensor, magnitude: MagnitudeViews) -> Tensor:
    """Accumulate dm = Σ dy·v / ‖W + scale·B A‖ into the adapter. Return c·dy [t, O], the gradient of v."""
    products_tO = dy_tO.to(magnitude.factor_O.dtype) * v_tO
    magnitude.grad_O.add_(products_tO.sum(0) / magnitude.norm_O)
    return (dy_tO * magnitude.factor_O).to(dy_tO.dtype)
