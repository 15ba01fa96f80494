# pyright: basic
"""Which way a pass is computed on this device: chosen once, when an engine attaches itself, and told by name.

What a CPU runs is what the other ways are tested against. Nothing here changes what is computed, only
the order of sums: a record then says `allclose` (lora_core/engine/invariance_probe.py).
"""

import inspect
from dataclasses import dataclass
from typing import Literal

import torch

from lora_core.kernels.batch_invariant import ExactProducts
from lora_core.kernels.gpu_elementwise import why_not

AMPERE = (8, 0)
"""A compute capability."""
GROUPING_MAJORS = (9, 10)
"""Of Hopper and of Blackwell for data centres. Elsewhere, cards of 12.0 among them, torch's grouped product is a loop
that waits for the device at every group."""
VARLEN_DTYPES = (torch.bfloat16, torch.float16)
VARLEN_PARAMETERS = {"window_size", "enable_gqa", "scale"}
"""Of torch's function, which has all of them from torch 2.12 on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """`lora`: of the adapters' products, segment by segment or one launch for all (lora_core/layers/grouped_lora.py).
    `attention`:
    sequence by sequence (attention.py) or all in one launch, where that kernel fits
    (lora_core/layers/attention/flash.py). `elementwise`: norms and gated activations, as
    lora_core/base_model/patching.py finds them for a CPU, or each compiled into one
    (lora_core/layers/compiled_elementwise.py).

    `batch_invariant`: what keeps the bits of products over the tokens of several jobs from depending on their number of
    rows (batch_invariant.py); None on a GPU, and for an engine that is told to do without. A record is then `allclose`.

    `reasons`: why this device isn't given what is fastest on a GPU; empty on a CPU, where nothing is missing.
    """

    lora: Literal["loop", "grouped_mm"] = "loop"
    attention: Literal["sequences", "varlen"] = "sequences"
    elementwise: Literal["eager", "compiled"] = "eager"
    batch_invariant: ExactProducts | None = None
    reasons: tuple[str, ...] = ()


def choose_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    if device.type != "cuda":
        return Kernels()
    capability = torch.cuda.get_device_capability(device)
    why_no_groups, why_no_varlen = _why_no_groups(capability, dtype), _why_no_varlen(capability, dtype)
    why_not_compiled = why_not(device)
    return Kernels(
        lora="grouped_mm" if why_no_groups is None else "loop",
        attention="varlen" if why_no_varlen is None else "sequences",
        elementwise="compiled" if why_not_compiled is None else "eager",
        reasons=tuple(filter(None, (why_no_groups, why_no_varlen, why_not_compiled))),
    )


def _why_no_groups(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return f"LoRA runs segment by segment: grouped products need bfloat16, and the base is held in {dtype}"
    if capability[0] not in GROUPING_MAJORS:
        needed = "compute capability 9 or 10"
        return f"LoRA runs segment by segment: grouped products need {needed}, not {_spelt(capability)}"
    return None


def _why_no_varlen(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    attention = "attention runs sequence by sequence"
    if dtype not in VARLEN_DTYPES:
        return f"{attention}: the kernel for all of them needs bfloat16, and the base is held in {dtype}"
    if capability < AMPERE:
        return f"{attention}: the kernel for all of them needs compute capability 8.0, not {_spelt(capability)}"
    if not _torch_has_varlen():
        return f"{attention}: the kernel for all of them needs torch 2.12, not {torch.__version__}"
    return None


def _torch_has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return False
    return inspect.signature(varlen_attn).parameters.keys() >= VARLEN_PARAMETERS


def _spelt(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
