# pyright: basic, reportMissingImports=false
"""Base models whose linears bitsandbytes holds in 4 or 8 bits. Adapters, norms and head keep the compute dtype.

Only loading is special: a quantized linear computes with its own forward, to which the engine adds LoRA.
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
"""Warns at every matmul of an int8 linear that inputs are cast, which is expected."""


def load_quantized(
    base_dir: Path, *, quantization: Literal["nf4", "int8"], dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """Load a model and quantize every linear except the head, as transformers does. Raises UnsupportedModel."""
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
            # Otherwise a pass without gradients repacks the weight, and later passes have no backward.
            linear.support_avx512bf16_for_cpu = False
    return model


def quantization_in_training(weights: Path) -> Quantization:
    """Return the base model's quantization in training, from the metadata that Lorry writes. Raises UnsafeFile."""
    try:
        with safe_open(weights, framework="pt") as file:
            how = (file.metadata() or {}).get("base_quantization_config")
        if how is None:
            return "none"
        return "nf4" if json.loads(how).get("load_in_4bit") else "int8"
    except (SafetensorError, ValueError, RecursionError, AttributeError) as error:
        raise UnsafeFile(
            f"{weights.name} can't be read as safetensors, or its base_quantization_config is invalid.",
            remedy="Export the adapter again, for example with PEFT's save_pretrained.",
        ) from error


def quantization_config(quantization: Literal["nf4", "int8"], dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the config for NF4 with double quantization as in QLoRA (arXiv 2305.14314), or int8 (arXiv 2208.07339).

    int8 is without outlier columns (threshold 0). bitsandbytes searches for them in all tokens of a pass, so packmates'
    activations would change the rounding of a job. The int8 matmul casts inputs to fp16 whatever the dtype: values
    above 65,504 become infinite, and the job then ends as diverged.
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
    """Return the bytes of quantization scales, in addition to the weights. 0 for a model without quantization."""
    return sum(scale.nbytes for linear in _quantized_linears(model) for scale in _scales(linear))


def _require_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise UnsupportedModel(
            "Quantized base models need the package bitsandbytes, which is not installed on the worker.",
            remedy="Install `lorry-server[quant]` on the worker, or train without quantization.",
        ) from error


def _quantized_linears(model: PreTrainedModel) -> list[Any]:
    names = ("Linear4bit", "Linear8bitLt")
    return [module for module in model.modules() if isinstance(module, nn.Linear) and type(module).__name__ in names]


def _scales(linear: Any) -> list[torch.Tensor]:
    """Return the scales. int8: one per row, on the weight until the first pass, then on the linear. NF4: two levels."""
    if hasattr(linear, "state"):
        return [scale for scale in (linear.weight.SCB, linear.state.SCB) if scale is not None]
    first, second = linear.weight.quant_state, linear.weight.quant_state.state2
    return [first.absmax, first.code, first.offset, second.absmax, second.code]
