"""What a job takes of a device's memory, by what it is for, and the smallest device that it fits. Pure; bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GIB, MIB = 2**30, 2**20
CUDA_BYTES = 600 * MIB
"""That CUDA's context, its libraries and torch's own rounding take of a GPU, beside what is reckoned: 450 to 600 MiB
on cards of the last generations."""

PARTS: Mapping[str, str] = {
    "base": "the frozen base model",
    "undivided": "what every device holds of the base: embeddings, head, norms",
    "base_share": "its share of the base's blocks",
    "coming_share": "its share of a block, as it comes from the host's memory",
    "gathered_blocks": "blocks of the base that are whole while they compute",
    "activations": "activations of one tick, until its backward",
    "logits": "one chunk of logits, with its gradient",
    "restored_weights": "the largest quantized weight, restored for a product",
    "row": "the adapter's weights, gradient and what the optimizer remembers",
    "best_weights": "the best weights so far",
    "parent": "the adapter that it continues, to compare with",
    "dora": "lengths of DoRA",
    "subtracted_start": "the start that is subtracted from the base",
    "slice_gradients": "gradients of further slices",
    "beyond_a_slice": "its longest row, its start or its samples, beyond a usual slice",
}
"""What each part is, in the order in which they are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A common size of GPU, with the least memory that its driver reports on one of that size."""

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
"""Smallest first. The bytes are what nvidia-smi shows of them as total, of variants with ECC the least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBreakdown:
    """A worker's device."""

    worker_id: str
    name: str
    kind: str
    memory_bytes: int
    """Of each of its devices."""
    num_devices: int
    strategy: str
    """How its trainer would hold the base: see sharding.py."""
    needed_bytes: int
    """On each device."""


def total(parts: Mapping[str, int], *, kind: str) -> int:
    """On a device of that kind."""
    return sum(parts.values()) + (CUDA_BYTES if kind == "cuda" else 0)


def listed(parts: Mapping[str, int]) -> list[tuple[str, int, str]]:
    """(part, bytes, what it is) of those that take anything."""
    return [(name, parts[name], told) for name, told in PARTS.items() if parts.get(name)]


def smallest_card(num_bytes: int) -> Card | None:
    """num_bytes: `total` on cuda. None: none holds it."""
    return next((card for card in CARDS if card.memory_bytes >= num_bytes), None)


def that_fit(breakdowns: Sequence[MemoryBreakdown]) -> list[MemoryBreakdown]:
    """Smallest first. What a worker of one GPU is asked for when it claims leaves CUDA out, and looks at what is
    free."""
    fitting = [device for device in breakdowns if device.needed_bytes <= device.memory_bytes]
    return sorted(fitting, key=lambda device: (device.memory_bytes, device.worker_id))
