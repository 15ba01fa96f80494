# pyright: basic
"""Draws the inputs of the kernel tests that run before an engine uses a kernel."""

import torch
from torch import Tensor


def numbers(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Return numbers between -1 and 1 that do not repeat."""
    count = torch.Size(shape).numel()
    return torch.sin((torch.arange(count, dtype=torch.float64) + seed) ** 1.5 * 0.7).float().view(shape).to(device)
