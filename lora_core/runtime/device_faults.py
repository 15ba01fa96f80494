# pyright: basic
"""What a GPU does to whoever computes on it. No job's fault, and what failed so may never be said to be one's."""

import torch

from lora_core.runtime.device_errors import is_shortage

SIGNS = ("CUDA error", "CUDA driver error", "Triton Error", "_STATUS_", "device-side assert", "HIP error")
"""In messages of torch, of Triton, and of cuBLAS, cuDNN, cuSOLVER and cuSPARSE, which raise a plain RuntimeError."""


def is_device_fault(error: BaseException) -> bool:
    """Whether the device itself failed: most often this process can compute nothing on it from then on. Memory that
    ran out is none: device_errors.py knows that."""
    if is_shortage(error):
        return False
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    return told or isinstance(error, torch.AcceleratorError)
