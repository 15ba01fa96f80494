"""Finds the smallest common GPU with enough memory for a job, from the parts of its need. Pure; sizes in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GIB, MIB = 2**30, 2**20
CUDA_BYTES = 600 * MIB
"""GPU memory for CUDA's context, its libraries and torch's rounding, in addition to the estimate of the job: 450 to
600 MiB on cards of the last generations."""

PARTS: Mapping[str, str] = {
    "base": "the frozen base model",
    "undivided": "replicated layers of a sharded base model: embeddings, head, norms",
    "base_share": "the device's shard of the base model's blocks",
    "coming_share": "the device's shard of one block, during the copy from host memory",
    "gathered_blocks": "base model blocks that are gathered for computation",
    "activations": "activations of one tick, until its backward pass",
    "logits": "one chunk of logits, with its gradient",
    "restored_weights": "the largest quantized weight, dequantized for a matmul",
    "row": "adapter weights, gradients and optimizer state",
    "best_weights": "copy of the best weights so far",
    "parent": "parent adapter, as the reference of the loss",
    "dora": "weight norms and scaling factors of DoRA",
    "subtracted_start": "initial PiSSA or OLoRA weights, subtracted from the base model",
    "slice_gradients": "gradients of additional slices",
    "lora_products": "products A x of LoRA, until the backward pass",
    "beyond_a_slice": "longest row, initialization or samples, beyond the size of a usual slice",
}
"""Descriptions of the parts, in the order in which they are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A common GPU size, with the least memory that the driver reports for a GPU of that size."""

    gigabytes: int
    memory_bytes: int
    examples: str


CARDS: tuple[Card, ...] = (
    Card(gigabytes=8, memory_bytes=8188 * MIB, examples="RTX 4060, RTX 3070"),
    Card(gigabytes=12, memory_bytes=12282 * MIB, examples="RTX 3060, RTX 4070"),
    Card(gigabytes=16, memory_bytes=15360 * MIB, examples="T4, RTX 4080, V100 16 GB"),
    Card(gigabytes=24, memory_bytes=22731 * MIB, examples="A10G, L4, RTX 3090, RTX 4090"),
    Card(gigabytes=32, memory_bytes=32510 * MIB, examples="V100 32 GB, RTX 5090"),
    Card(gigabytes=40, memory_bytes=40536 * MIB, examples="A100 40 GB"),
    Card(gigabytes=48, memory_bytes=45634 * MIB, examples="L40S, A40, RTX A6000"),
    Card(gigabytes=80, memory_bytes=81079 * MIB, examples="A100 80 GB, H100"),
    Card(gigabytes=141, memory_bytes=143156 * MIB, examples="H200"),
    Card(gigabytes=180, memory_bytes=182642 * MIB, examples="B200"),
)
"""Smallest first. The bytes are the total memory in nvidia-smi; the least of several variants, for example with ECC."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBreakdown:
    """The memory of a worker's devices, and the memory that a job needs there."""

    worker_id: str
    name: str
    kind: str
    memory_bytes: int
    """Memory of each device."""
    num_devices: int
    strategy: str
    """How its trainer would hold the base model; see sharding.py."""
    needed_bytes: int
    """Memory that the job needs on each device."""


def total(parts: Mapping[str, int], *, kind: str) -> int:
    """Return the sum of the parts, and on a GPU of CUDA_BYTES."""
    return sum(parts.values()) + (CUDA_BYTES if kind == "cuda" else 0)


def listed(parts: Mapping[str, int]) -> list[tuple[str, int, str]]:
    """Return (part, bytes, description) of the parts that are not empty."""
    return [(name, parts[name], description) for name, description in PARTS.items() if parts.get(name)]


def smallest_card(num_bytes: int) -> Card | None:
    """Return the smallest GPU that holds `num_bytes`, a `total` for cuda; None if none is large enough."""
    return next((card for card in CARDS if card.memory_bytes >= num_bytes), None)


def that_fit(breakdowns: Sequence[MemoryBreakdown]) -> list[MemoryBreakdown]:
    """Return the devices with enough total memory, smallest first.

    A claim is more precise: it compares with the free memory.
    """
    fitting = [device for device in breakdowns if device.needed_bytes <= device.memory_bytes]
    return sorted(fitting, key=lambda device: (device.memory_bytes, device.worker_id))
