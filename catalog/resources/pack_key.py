"""The pack key: jobs with equal keys may share a trainer. Pure.

catalog/scheduling/packing.py decides which of these jobs train together.
"""

from __future__ import annotations


def pack_key(base_digest: str, precision: str, quantization: str = "none") -> str:
    """Return the key: base model digest, dtype with quantization, task head."""
    weights = precision if quantization == "none" else f"{precision}+{quantization}"
    return f"{base_digest}:{weights}:causal-lm"


def precision_of(key: str) -> str:
    """Return the dtype in a pack key."""
    return _weights_of(key).partition("+")[0]


def quantization_of(key: str) -> str:
    """Return the quantization of the base model's linear layers: none, nf4 or int8."""
    return _weights_of(key).partition("+")[2] or "none"


def weights_of(key: str) -> str:
    """Return dtype and quantization for a sentence: `float32`, or `nf4 with bfloat16`."""
    quantization = quantization_of(key)
    return precision_of(key) if quantization == "none" else f"{quantization} with {precision_of(key)}"


def _weights_of(key: str) -> str:
    return key.rsplit(":", 2)[1]
