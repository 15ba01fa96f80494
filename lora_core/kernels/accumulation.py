# pyright: basic
"""Sums of matrix products in the dtype of the sum. Shape suffixes: N rows, K shared dimension, M columns."""

from functools import cache

import torch
from torch import Tensor

from lora_core.kernels.on_device import on_gpu


def add_product(total_NM: Tensor, a_NK: Tensor, b_KM: Tensor) -> None:
    """Add a · b to an fp32 sum in place. a and b have the compute dtype.

    On a GPU one launch does it, and the product takes no memory and is not rounded. Elsewhere the product is rounded to
    the compute dtype first, as in autograd.
    """
    if on_gpu(total_NM) and total_NM.dtype == a_NK.dtype:
        total_NM.addmm_(a_NK, b_KM)
    elif on_gpu(total_NM) and adds_in_float32(total_NM.device, a_NK.dtype):
        torch.addmm(total_NM, a_NK, b_KM, out_dtype=total_NM.dtype, out=total_NM)
    else:
        total_NM.add_(a_NK @ b_KM)


@cache
def adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch adds a product of this dtype to an fp32 matrix on the device. Later calls read the result.

    Early versions of `out_dtype` accept no fp32 matrix to add to.
    """
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
