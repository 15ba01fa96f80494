# pyright: basic
"""Random numbers on the device that uses them. A GPU draws them itself, with the bits of the host.

If its kernels fail their trial, the host draws the numbers and copies them to the device.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lora_core.kernels.gpu import random_numbers_trial
from lora_core.kernels.gpu.trial_failures import reason_of_others
from lora_core.runtime.counter_rng import coin_flips, philox_key, uniform_within
from lora_core.runtime.transfers import upload

_refused: dict[torch.device, str] = {}


def why_host_draws(device: torch.device) -> str | None:
    """Return why a CUDA device does not draw its own random numbers, or None."""
    return _refused.get(device) or random_numbers_trial.why_not_drawn(device)


def agree_on_drawing(device: torch.device, gathered: Callable[[str | None], list[str | None]]) -> None:
    """Let the device draw only if the devices of all ranks do, so that an initialization takes all as many ticks.

    `gathered` returns the value of every rank.
    """
    reason = reason_of_others(why_host_draws(device), gathered)
    if reason is not None:
        _refused[device] = reason


def draws(device: torch.device) -> bool:
    """Return whether the device draws its own random numbers."""
    return device.type == "cuda" and why_host_draws(device) is None


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
