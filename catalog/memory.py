"""Byte arithmetic for placing jobs: what an adapter's row, a base and a tick occupy. Pure; all results in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from catalog.linears import Adapted

VECTORS_PER_ROW = 4
"""Parameters, gradient and the two moments of AdamW, all fp32."""
ACTIVATIONS_PER_FEATURE = 2
"""Numbers kept for the backward per input feature of a linear: its input, and what norms and activations keep.
The mask of a job's dropout is beside these: see MASK_BYTES_PER_FEATURE."""
MASK_BYTES_PER_FEATURE = 1
"""What dropout kept of each input feature of a linear, per token of its job, until the backward."""
BYTES_PER_NUMBER = {"bfloat16": 2, "float32": 4}
SLICE_TOKENS = 1024
"""What one job puts into a tick; more only where a single row is longer."""
TICK_TOKENS = {"cpu": 1024, "cuda": 8192}
"""What a tick grows to with the pack, by kind of device. Past these a larger tick gained nothing where it was
measured (CPU) or is expected to (GPU)."""
LOGIT_CHUNK_ROWS = 256
"""Positions whose logits exist at one time."""

Shapes = Mapping[str, Any]
"""{"q_proj": [[out_features, in_features], count], …}, as lora_core describes a base."""


def adapter_parameters(targets: Iterable[Adapted], *, use_dora: bool) -> int:
    """Numbers in A (rank x in) and B (out x rank) over every target, and in DoRA's magnitudes (out)."""
    return sum(
        target.rank * (target.linear.out_features + target.linear.in_features)
        + (target.linear.out_features if use_dora else 0)
        for target in targets
    )


def row_bytes(num_parameters: int) -> int:
    """One job's row with its gradient and moments."""
    return VECTORS_PER_ROW * 4 * num_parameters


def own_bytes(description: Mapping[str, Any], *, num_parameters: int, dropout: float) -> int:
    """What a job takes wherever it trains: its row and, with dropout, a slice's mask as if every linear had one."""
    shapes: Shapes = description.get("linear_shapes", {})
    mask = SLICE_TOKENS * _input_features(shapes) * MASK_BYTES_PER_FEATURE if dropout else 0
    return row_bytes(num_parameters) + mask


def base_bytes(num_parameters: int, precision: str) -> int:
    """The frozen weights."""
    return num_parameters * BYTES_PER_NUMBER[precision]


def activation_bytes_per_token(shapes: Shapes, precision: str) -> int:
    """What one token of a tick keeps until its backward."""
    return _input_features(shapes) * ACTIVATIONS_PER_FEATURE * BYTES_PER_NUMBER[precision]


def tick_bytes(description: Mapping[str, Any], precision: str, *, num_tokens: int) -> int:
    """Activations and one chunk of logits (fp32, with their gradient) of a tick of `num_tokens`."""
    activations = num_tokens * activation_bytes_per_token(description.get("linear_shapes", {}), precision)
    logits = 2 * 4 * LOGIT_CHUNK_ROWS * int(description.get("vocab_size", 0))
    return activations + logits


def slice_bytes(description: Mapping[str, Any], precision: str) -> int:
    """Activations that a further job brings into a tick that has not reached its size yet."""
    return SLICE_TOKENS * activation_bytes_per_token(description.get("linear_shapes", {}), precision)


def widens_tick(num_before: int, *, tick_tokens: int) -> bool:
    """Whether a job beside `num_before` others brings a slice of its own; the first one's is in `trainer_bytes`."""
    return 0 < num_before < tick_tokens // SLICE_TOKENS


def trainer_bytes(description: Mapping[str, Any], precision: str, *, num_tokens: int = SLICE_TOKENS) -> int:
    """A trainer before its first job: base and one tick, in which a job alone has one slice on any device."""
    base = base_bytes(int(description.get("num_parameters", 0)), precision)
    return base + tick_bytes(description, precision, num_tokens=num_tokens)


def readable(num_bytes: float) -> str:
    """For a sentence, in decimal units as everywhere else: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _input_features(shapes: Shapes) -> int:
    """Of all linears together."""
    return sum(in_features * count for (_, in_features), count in shapes.values())
