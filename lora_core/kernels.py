# pyright: basic
"""Which way a pass is computed on this device: chosen once, when an engine attaches itself, and told by name.

What a CPU runs is the reference that the other ways are tested against. Nothing here changes what is computed, only
the order of sums: a record then says `allclose` (probe.py).
"""

from dataclasses import dataclass
from typing import Literal

import torch

HOPPER = (9, 0)
"""Before it, torch's grouped product is a loop that waits for the device at every group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """`lora`: of the adapters' products, segment by segment or one launch for all (segment_op.py).

    `reasons`: why this device isn't given what is fastest on a GPU; empty on a CPU, where nothing is missing.
    """

    lora: Literal["loop", "grouped_mm"] = "loop"
    reasons: tuple[str, ...] = ()


def choose_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    if device.type != "cuda":
        return Kernels()
    why_no_groups = _why_no_groups(torch.cuda.get_device_capability(device), dtype)
    return Kernels(
        lora="grouped_mm" if why_no_groups is None else "loop",
        reasons=tuple(filter(None, (why_no_groups,))),
    )


def _why_no_groups(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return f"LoRA runs segment by segment: grouped products need bfloat16, and the base is held in {dtype}"
    if capability < HOPPER:
        return f"LoRA runs segment by segment: grouped products need a GPU of compute capability 9.0, not {capability}"
    return None
