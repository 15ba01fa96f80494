# pyright: basic
"""Trial of the kernel that draws dropout masks on a device: it must give the numbers of the host, bit for bit."""

from functools import cache

import torch

from lora_core.kernels.gpu.trial_failures import failure_of
from lora_core.runtime.counter_rng import coin_flips, key_words
from lora_core.runtime.transfers import upload

COUNT, THRESHOLD, NUM_KEYS = 10_007, 58_982, 4
ON_HOST = "the host draws the dropout masks of jobs whose LoRA runs segment by segment"


@cache
def why_not_drawn(device: torch.device) -> str | None:
    """Return why a CUDA device can't draw dropout masks, or None. Later calls read the result.

    Raises torch.AcceleratorError if the device can't be used any more.
    """
    try:
        from lora_core.kernels.gpu.dropout import draw_mask

        modules = [str(number) for number in range(NUM_KEYS)]
        for module, key in zip(modules, key_words("dropout", 0, endings=modules), strict=True):
            flips = coin_flips("dropout", 0, module, count=COUNT, threshold=THRESHOLD)
            (expected,) = upload([flips.view("uint8")], device)
            if not torch.equal(draw_mask(key, THRESHOLD, expected), expected):
                return f"{ON_HOST}: the masks of the Triton kernel differ"
    except Exception as error:  # noqa: BLE001  (Triton's errors have no other base class)
        return f"{ON_HOST}: {failure_of(error, device)}"
    return None
