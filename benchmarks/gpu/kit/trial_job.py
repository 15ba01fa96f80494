"""`python -m benchmarks.gpu.kit.trial_job DEVICE FAMILY DTYPE ARGUMENTS`: tries some kernels, and so compiles them.

The last line of its output is JSON: `reason` is why the kernels can't be used, or null, and `fault` is an error that
made the device unusable for the process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from lora_core.kernels.gpu.attention_trial import why_attention_differs
from lora_core.kernels.gpu.decoding_trial import why_decoding_differs
from lora_core.kernels.gpu.elementwise_trial import why_elementwise_differs
from lora_core.kernels.gpu.random_numbers_trial import why_not_drawn
from lora_core.kernels.gpu.trials import TRIED, why_lora_differs


def reason_of(device: torch.device, family: str, dtype: torch.dtype, arguments: Sequence[str]) -> str | None:
    """Return why the kernels can't be used, or None. Raises torch.AcceleratorError after a fault of the device.

    `arguments` are the number of a trial of LoRA, or the features of heads and whether scores have a cap.
    """
    if family == "lora":
        return why_lora_differs(device, dtype, (TRIED[int(arguments[0])],))
    if family in ("attention", "decoding"):
        differs = why_attention_differs if family == "attention" else why_decoding_differs
        return differs(device, dtype, size=int(arguments[0]), is_capped=arguments[1] == "capped")
    return why_not_drawn(device) if family == "random" else why_elementwise_differs(device, dtype)


def main(arguments: Sequence[str]) -> None:
    name, family, dtype, *others = arguments
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    result: dict[str, Any] = {}
    try:
        result["reason"] = reason_of(device, family, getattr(torch, dtype), others)
    except torch.AcceleratorError as fault:
        result["fault"] = str(fault).partition("\n")[0]
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
