# pyright: basic
"""Random numbers on the device that uses them. A GPU draws them itself, with the bits of the host.

If its elementwise kernels can't be used, the host draws the numbers and copies them to the device.
"""

import numpy as np
import torch
from torch import Tensor

from lora_core.kernels.gpu.comparison import reason_against
from lora_core.runtime.counter_rng import coin_flips, philox_key, uniform_within
from lora_core.runtime.transfers import upload


def draws(device: torch.device) -> bool:
    """Return whether the device draws its own random numbers."""
    return device.type == "cuda" and reason_against("elementwise", device) is None


def mask_like(like: Tensor, *key: int | str, threshold: int) -> Tensor:
    """Return `coin_flips` as uint8, shaped as `like` and on its device. A CPU casts uint8 faster than bool."""
    if draws(like.device):
        from lora_core.kernels.gpu.random_numbers import draw_mask

        return draw_mask(philox_key(*key), threshold, like)
    flips = coin_flips(*key, count=like.numel(), threshold=threshold)
    return upload([flips.view(np.uint8)], like.device)[0].view(like.shape)


def uniform_rows(bounds: np.ndarray, num_columns: int, *key: int | str, device: torch.device) -> Tensor:
    """Return `uniform_within` as fp32 [M, num_columns] on the device, for bounds fp64 [M]."""
    if draws(device):
        from lora_core.kernels.gpu.random_numbers import draw_within

        return draw_within(philox_key(*key), upload([bounds], device)[0], num_columns)
    return upload([uniform_within(*key, bounds=bounds, num_columns=num_columns)], device)[0]
