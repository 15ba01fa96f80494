# pyright: basic, reportMissingImports=false
"""Base models whose linears are held in 4 or 8 bits by bitsandbytes; adapters, norms and the head stay in the dtype.

Only the loading is special: a quantized linear computes with its own forward, beside which the engine adds LoRA.
"""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lora_core.base_model.loading import load_with_transformers
from lora_core.errors import UnsafeFile, UnsupportedModel

Quantization = Literal["none", "nf4", "int8"]
NOISY_LOGGER = "bitsandbytes.autograd._functions"
"""Says at every product of an int8 linear that the inputs are cast, which is no news after the first."""


def load_quantized(
    base_dir: Path, *, quantization: Literal["nf4", "int8"], dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """Quantize every linear but the head while loading, as transformers does it. Raises UnsupportedModel."""
    _require_bitsandbytes()
    logging.getLogger(NOISY_LOGGER).setLevel(logging.ERROR)
    model = load_with_transformers(
        base_dir,
        dtype=dtype,
        quantization_config=quantization_config(quantization, dtype),
        device_map={"": device},
    )
    if quantization == "nf4":
        for linear in _quantized_linears(model):
            # Else a pass without gradients repacks the weight, and no later pass has a backward.
            linear.support_avx512bf16_for_cpu = False
    return model


def quantization_in_training(weights: Path) -> Quantization:
    """How the base of an adapter was held, as the file of its weights says if Lorry wrote it. Raises UnsafeFile."""
    try:
        with safe_open(weights, framework="pt") as file:
            how = (file.metadata() or {}).get("base_quantization_config")
        if how is None:
            return "none"
        return "nf4" if json.loads(how).get("load_in_4bit") else "int8"
    except (SafetensorError, ValueError, RecursionError, AttributeError) as error:
        raise UnsafeFile(
            f"{weights.name} can't be read as safetensors, or its base_quantization_config can't.",
            remedy="Give a safetensors file written by a known tool.",
        ) from error


def quantization_config(quantization: Literal["nf4", "int8"], dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization as in QLoRA (arXiv 2305.14314), or int8 by rows (arXiv 2208.07339).

    Without the outlier columns of the latter (threshold 0): bitsandbytes looks for them in all tokens of a tick,
    so a packmate's activations would decide how a job's are rounded. Its int8 product casts the inputs to fp16,
    whatever the dtype: what exceeds 65,504 becomes infinite, and such a job ends as one that diverged.
    """
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def scale_bytes(model: PreTrainedModel) -> int:
    """What the scales of quantized weights take beside the weights themselves; 0 for a plain model."""
    return sum(scale.nbytes for linear in _quantized_linears(model) for scale in _scales(linear))


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise UnsupportedModel(
            "A quantized base model needs bitsandbytes, which isn't installed where the worker runs.",
            remedy="Install the extra 'quant' there, or train on the base model as it is.",
        ) from error


def _quantized_linears(model: PreTrainedModel) -> list[Any]:
    names = ("Linear4bit", "Linear8bitLt")
    return [module for module in model.modules() if isinstance(module, nn.Linear) and type(module).__name__ in names]


def _scales(linear: Any) -> list[torch.Tensor]:
    """int8: one a row, with the weight until the first pass, then with the linear. NF4: of blocks, and of those."""
    if hasattr(linear, "state"):
        return [scale for scale in (linear.weight.SCB, linear.state.SCB) if scale is not None]
    first, second = linear.weight.quant_state, linear.weight.quant_state.state2
    return [first.absmax, first.code, first.offset, second.absmax, second.code]
