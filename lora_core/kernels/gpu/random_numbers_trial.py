# pyright: basic
"""Trial of the kernels that draw random numbers on a device: they must give the numbers of the host, bit for bit."""

from functools import cache

import numpy as np
import torch

from lora_core.kernels.gpu.trial_failures import failure_of
from lora_core.runtime.counter_rng import coin_flips, philox_key, uniform_within
from lora_core.runtime.transfers import upload

COUNT, THRESHOLD, NUM_KEYS = 10_007, 58_982, 4
BOUNDS, NUM_COLUMNS = np.array([0.5, 1e-3, 4096**-0.5, 70.0, 3**-0.5]), 1_003
ON_HOST = "the host draws initial weights and noise, and the dropout masks of jobs whose LoRA runs segment by segment"


@cache
def why_not_drawn(device: torch.device) -> str | None:
    """Return why a CUDA device can't draw random numbers, or None. Later calls read the result.

    Raises torch.AcceleratorError if the device can't be used any more.
    """
    try:
        from lora_core.kernels.gpu.random_numbers import draw_mask, draw_within

        for number in range(NUM_KEYS):
            key = philox_key("trial", number)
            flips = coin_flips("trial", number, count=COUNT, threshold=THRESHOLD).view(np.uint8)
            numbers = uniform_within("trial", number, bounds=BOUNDS, num_columns=NUM_COLUMNS)
            mask, within, bounds = upload([flips, numbers, BOUNDS], device)
            if not torch.equal(draw_mask(key, THRESHOLD, mask), mask):
                return f"{ON_HOST}: the masks of the Triton kernel differ"
            if not torch.equal(draw_within(key, bounds, NUM_COLUMNS), within):
                return f"{ON_HOST}: the uniform numbers of the Triton kernel differ"
    except Exception as error:  # noqa: BLE001  (Triton's errors have no other base class)
        return f"{ON_HOST}: {failure_of(error, device)}"
    return None
