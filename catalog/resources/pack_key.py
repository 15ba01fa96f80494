"""The pack key: which jobs may share a trainer, and what the key tells of it. Pure.

Who of those trains together is decided in catalog/scheduling/packing.py.
"""

from __future__ import annotations


def pack_key(base_digest: str, precision: str, quantization: str = "none") -> str:
    """Jobs train together where this is equal: base, dtype with quantization, task head."""
    weights = precision if quantization == "none" else f"{precision}+{quantization}"
    return f"{base_digest}:{weights}:causal-lm"


def precision_of(key: str) -> str:
    """The dtype within a pack key."""
    return _weights_of(key).partition("+")[0]


def quantization_of(key: str) -> str:
    """none, nf4 or int8: how the base's linears are held."""
    return _weights_of(key).partition("+")[2] or "none"


def weights_of(key: str) -> str:
    """Dtype and quantization for a sentence: float32; nf4 with bfloat16."""
    quantization = quantization_of(key)
    return precision_of(key) if quantization == "none" else f"{quantization} with {precision_of(key)}"


def _weights_of(key: str) -> str:
    return key.rsplit(":", 2)[1]
