# pyright: basic
"""Selects the kernels for a device, once, when an engine attaches itself.

The other kernels are tested against those of a CPU. A choice changes only the order of sums, in which case the
determinism level is `allclose` (lora_core/engine/invariance_probe.py).
"""

import inspect
from dataclasses import dataclass
from typing import Literal

import torch

from lora_core.kernels.batch_invariant import ExactProducts
from lora_core.kernels.gpu.comparison import AMPERE, reason_against

VARLEN_DTYPES = (torch.bfloat16, torch.float16)
VARLEN_PARAMETERS = {"window_size", "scale"}
"""Required parameters of torch's varlen_attn, which has them since torch 2.11."""
WIDEST_HEAD, HEAD_MULTIPLE = 256, 8
"""Limits of that kernel for the features of a head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionHeads:
    """The heads of a model: their number of features, and whether their scores have a cap."""

    size: int
    is_capped: bool

    @property
    def fits_varlen(self) -> bool:
        return not self.is_capped and self.size <= WIDEST_HEAD and self.size % HEAD_MULTIPLE == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """The kernels of an engine.

    Attributes:
        lora: Matmuls of adapters: "loop" over segments, or "tiled" for all segments in a few launches of Triton
            kernels (lora_core/layers/tiled_lora.py).
        attention: Over "sequences" one by one, or "varlen" in one launch where that kernel fits
            (lora_core/layers/attention/flash.py).
        tiled_head_size: Features of the heads that Triton kernels compute in one launch where varlen doesn't fit
            (lora_core/layers/attention/tiled_gpu.py). None if the model has no such heads or they can't be used.
        decoding_head_size: Features of the heads for which a Triton kernel computes the newest tokens of all answers in
            one launch (lora_core/layers/attention/cached.py). None if it can't be used.
        elementwise: Norms, gated activations and rotations on a GPU: "eager" as in the library, or "compiled" into one
            kernel each (lora_core/kernels/on_device.py). A CPU has compiled kernels in either case.
        batch_invariant: Matmuls over tokens of several jobs whose bits don't depend on the number of rows
            (batch_invariant.py). None on a GPU or if disabled. The determinism level is then `allclose`.
        reasons: Why the fastest GPU kernels can't be used on this device. Empty on a CPU.
    """

    lora: Literal["loop", "tiled"] = "loop"
    attention: Literal["sequences", "varlen"] = "sequences"
    tiled_head_size: int | None = None
    decoding_head_size: int | None = None
    elementwise: Literal["eager", "compiled"] = "eager"
    batch_invariant: ExactProducts | None = None
    reasons: tuple[str, ...] = ()


def prepare_device(device: torch.device) -> None:
    """Make a GPU the current device, to which Triton launches, and set torch's switches for it.

    cuDNN's attention builds a plan for each new length, which takes up to a second. The sums of a bf16 matmul stay in
    fp32, also where cuBLAS divides them among blocks.
    """
    if device.type == "cuda":
        if torch.cuda.is_available() and device.index is not None:
            torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def choose_kernels(device: torch.device, dtype: torch.dtype, heads: AttentionHeads | None = None) -> Kernels:
    """Return the kernels for a model of this dtype with these attention heads, None if they are not known."""
    if device.type != "cuda":
        return Kernels()
    against_lora, against_elementwise = reason_against("lora", device, dtype), reason_against("elementwise", device)
    against_varlen, against_attention, against_decoding = _reason_against_varlen(device, dtype), None, None
    tiled_size = decoding_size = None
    if heads is not None:
        options = {"size": heads.size, "is_capped": heads.is_capped}
        against_decoding = reason_against("decoding", device, dtype, **options)
        decoding_size = heads.size if against_decoding is None else None
        if against_varlen is not None or not heads.fits_varlen:
            against_attention = reason_against("attention", device, dtype, **options)
            tiled_size = heads.size if against_attention is None else None
    reasons = (
        *(against_lora, against_varlen if tiled_size is None else None, against_attention, against_decoding),
        against_elementwise,
    )
    return Kernels(
        lora="tiled" if against_lora is None else "loop",
        attention="varlen" if against_varlen is None else "sequences",
        tiled_head_size=tiled_size,
        decoding_head_size=decoding_size,
        elementwise="compiled" if against_elementwise is None else "eager",
        reasons=tuple(filter(None, reasons)),
    )


def _reason_against_varlen(device: torch.device, dtype: torch.dtype) -> str | None:
    attention, capability = "attention runs sequence by sequence", torch.cuda.get_device_capability(device)
    if dtype not in VARLEN_DTYPES:
        return f"{attention}: the varlen kernel needs bfloat16, but the base model has {dtype}"
    if capability < AMPERE:
        major, minor = capability
        return f"{attention}: the varlen kernel needs compute capability 8.0, not {major}.{minor}"
    if not varlen_parameters() >= VARLEN_PARAMETERS:
        return f"{attention}: the varlen kernel needs torch 2.11, not {torch.__version__}"
    return None


def varlen_parameters() -> frozenset[str]:
    """Return the names of the parameters of torch's varlen_attn. Empty before torch 2.10, which introduced it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)
