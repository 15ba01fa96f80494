# pyright: basic
"""Elementwise and loss kernels by device: compiled by Numba on a CPU, by Triton on CUDA. Both have the same signatures.

On a CPU they take arrays, on CUDA tensors.
"""

from typing import Any

import torch
from torch import Tensor

from lora_core.kernels import elementwise
from lora_core.kernels.gpu.comparison import reason_against
from lora_core.kernels.numba_jit import array_of, runs_on


def has_kernels(tensor: Tensor) -> bool:
    """Return whether there are kernels for the tensor's device and dtype. A comparison decides on CUDA."""
    if tensor.dtype not in (torch.bfloat16, torch.float32):
        return False
    return runs_on(tensor) or has_gpu_kernels(tensor)


def has_gpu_kernels(tensor: Tensor) -> bool:
    """Return whether there are kernels for the tensor's device, which is CUDA."""
    return on_gpu(tensor) and reason_against("elementwise", tensor.device) is None


def on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def kernels_of(tensor: Tensor) -> Any:
    """Return the module with the kernels of the tensor's device."""
    if not on_gpu(tensor):
        return elementwise
    from lora_core.kernels.gpu import elementwise as on_cuda

    return on_cuda


def memory_of(tensor: Tensor) -> Any:
    """Return a contiguous tensor as its kernels take it."""
    return tensor.detach() if on_gpu(tensor) else array_of(tensor)


def flat_memory_of(x: Tensor) -> tuple[Tensor, Any]:
    """Return `x`, copied if its last dimension isn't contiguous, and its memory from first to last element."""
    plain = x if x.stride(-1) == 1 else x.contiguous()
    span = 1 + sum((size - 1) * stride for size, stride in zip(plain.shape, plain.stride(), strict=True))
    return plain, memory_of(plain.as_strided((span,), (1,)))
