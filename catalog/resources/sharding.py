"""Strategies by which a device group holds a base model: replicated, sharded, or sharded in host memory. The smallest
common GPU with enough memory. Pure; bytes of one device.

The strategy depends only on the job and the group, never on free memory or on other jobs, so neither affects the result
of a job. lora_core/base_model/sharding.py implements the sharding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from catalog.resources.memory import BYTES_PER_NUMBER, readable
from catalog.spec.lora import begins_with_the_base

Strategy = Literal["replicated", "fsdp2", "zero3", "fsdp2_offload", "zero3_offload"]
Wanted = Literal["auto", "replicated", "fsdp2", "zero3", "fsdp2_offload", "zero3_offload"]
"""LORRY_STRATEGY of a worker, as set by the operator."""
ShardingStrategy = Literal["replicated", "sharded", "offloaded"]
"""Each device holds a full replica of the base model, or a shard of each block on the device or in host memory."""
ShardsWhen = Literal["never", "needed", "always", "offloaded"]
"""`offloaded`: always, with the shards in host memory."""

GATHERED_BLOCKS = 3
"""Gathered blocks on a device at one time: the block that computes, and two copies of the next one, as received from
the other devices and as unpacked."""
NCCL_BYTES = 2**30
"""NCCL's communication buffers on each GPU of a group. An assumption, not measured."""
HOST_PART = 0.9
"""Fraction of host memory for shards and trainer processes; the rest is for everything else."""
HOST_PROCESS_BYTES = 2**32
"""Host memory of a trainer process on a GPU. An assumption, not measured."""
NEVER = 2**62
"""Memory requirement of a job that a group can't train at all."""
COUNTS = (1, 2, 4, 8)
"""Common numbers of GPUs in a machine."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """Memory that a job needs alone in a trainer, on a device with a full replica of the base model."""

    whole_bytes: int
    shardable_bytes: int = 0
    """The part for blocks, which can be sharded across devices. 0: the job needs full weights on each device."""
    gathered_bytes: int = 0
    """Gathered blocks on each device at one time, in addition to its shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceGroup:
    """The devices on which the trainers of a worker run, with one process per device."""

    kind: str = "cpu"
    num_devices: int = 1
    bytes_of_each: int = 0
    """Memory of the smallest device."""
    wanted: Wanted = "auto"
    gang: str | None = None
    """Gang of the worker, whose trainers then also run on the devices of other workers."""
    smallest: str | None = None
    """Worker of that gang that `bytes_of_each` belongs to, if other workers were compared."""
    host_bytes: int = 0
    """Host memory that shards of a base model may use. 0 for a CPU group, whose device memory is the host memory."""

    @property
    def shards_when(self) -> ShardsWhen:
        """When the group shards a base model.

        A single device can't shard. A gang never shards, because the strategy of a job would depend on its leader.
        """
        if self.gang is not None or self.num_devices == 1 or self.wanted == "replicated":
            return "never"
        if self.wanted == "auto":
            return "needed"
        return "offloaded" if self.wanted.endswith("_offload") else "always"

    @property
    def reserve_bytes(self) -> int:
        """Memory on each GPU for CUDA, and for NCCL if there are several. A trainer takes it after free memory was
        measured."""
        if self.kind != "cuda":
            return 0
        are_several = self.num_devices > 1 or self.gang is not None
        return CUDA_BYTES + (NCCL_BYTES if are_several else 0)

    @property
    def usable_bytes(self) -> int:
        return self.bytes_of_each - self.reserve_bytes

    @property
    def host_limit_bytes(self) -> int:
        """Maximum host memory for shards. No limit for a CPU that always offloads: its shards stay where they were."""
        return NEVER if self.kind == "cpu" and self.shards_when == "offloaded" else self.host_bytes

    def holding(self, demand: Demand) -> ShardingStrategy:
        """Return how the group holds the base model for a job: the first of the three ways that has enough memory."""
        when = self.shards_when
        if when != "needed":
            return "replicated" if when == "never" else "sharded" if when == "always" else "offloaded"
        if not demand.shardable_bytes or demand.whole_bytes <= self.usable_bytes:
            return "replicated"
        fits_sharded = self.allocated_bytes(demand, "sharded") <= self.usable_bytes
        return "sharded" if fits_sharded or demand.shardable_bytes > self.host_limit_bytes else "offloaded"

    def strategy(self, demand: Demand) -> Strategy:
        holding = self.holding(demand)
        library = "zero3" if self.wanted.startswith("zero3") else "fsdp2"
        name = {"replicated": "replicated", "sharded": library, "offloaded": f"{library}_offload"}[holding]
        return cast(Strategy, name)

    def needed_bytes(self, demand: Demand) -> int:
        """Return the memory that the job needs on each device; NEVER if the group can't train it."""
        holding = self.holding(demand)
        is_barred = holding != "replicated" and not demand.shardable_bytes
        if is_barred or (holding == "offloaded" and demand.shardable_bytes > self.host_limit_bytes):
            return NEVER
        return self.allocated_bytes(demand, holding) + self.reserve_bytes

    def allocated_bytes(self, demand: Demand, holding: ShardingStrategy) -> int:
        """Return `needed_bytes` for `holding`, without the reserve for CUDA and NCCL."""
        if holding == "replicated":
            return demand.whole_bytes
        return demand.whole_bytes - demand.shardable_bytes + sum(self.block_parts(demand, holding).values())

    def block_parts(self, demand: Demand, holding: ShardingStrategy) -> dict[str, int]:
        """Return the memory of a device for the blocks of a sharded base model, by part.

        An offloaded shard of a block is copied from host memory to the device before the devices gather the block.
        """
        share, gathered = self.share_bytes(demand), demand.gathered_bytes
        if holding == "sharded":
            return {"base_share": share, "gathered_blocks": gathered}
        coming = math.ceil(gathered / (GATHERED_BLOCKS * self.num_devices))
        return {"base_share": share * self.keeps_shares, "gathered_blocks": gathered, "coming_share": coming}

    def share_bytes(self, demand: Demand) -> int:
        """Return the size of a device's shard of all blocks."""
        return math.ceil(demand.shardable_bytes / self.num_devices)

    @property
    def keeps_shares(self) -> bool:
        """Whether offloaded shards still use device memory, because a CPU's device memory is the host memory."""
        return self.kind == "cpu"


SINGLE = DeviceGroup()


def reported_group(devices: Sequence[Mapping[str, Any]], memory_bytes: int) -> DeviceGroup:
    """Return the device group that a worker reported."""
    first: Mapping[str, Any] = devices[0] if devices else {}
    return DeviceGroup(
        kind=first.get("kind", "cpu"),
        num_devices=int(first.get("num_processes") or len(first.get("indices") or ()) or 1),
        bytes_of_each=memory_bytes,
        wanted=first.get("strategy", "replicated"),
        gang=first.get("gang"),
        host_bytes=int(first.get("host_bytes") or 0),
    )


def host_bytes(memory_bytes: int, *, num_processes: int) -> int:
    """Return the host memory that shards may use. `memory_bytes`: the part of host memory for these processes."""
    return max(0, int(HOST_PART * memory_bytes) - num_processes * HOST_PROCESS_BYTES)


def block_bytes(description: Mapping[str, Any], precision: str) -> tuple[int, int]:
    """Return the bytes of all blocks, which can be sharded, and of the gathered blocks on a device at one time.

    Embeddings, head and final norm are in no block.
    """
    blocks, width = description["blocks"], BYTES_PER_NUMBER[precision]
    return blocks["num_parameters"] * width, GATHERED_BLOCKS * blocks["largest_parameters"] * width


def hindrance(lora: Mapping[str, Any], quantization: str, description: Mapping[str, Any]) -> str | None:
    """Return why a job can't be trained on a sharded base model, as a sentence without its period; None if it can."""
    if quantization != "none":
        return f"A base model quantized to {quantization} can't be sharded"
    if lora.get("use_dora"):
        return "DoRA needs the full weights of the base model on each device, so the base model can't be sharded"
    start = lora.get("init_lora_weights")
    if begins_with_the_base(start):
        return f"{start} decomposes the full weights of the base model, so the base model can't be sharded"
    if not description.get("blocks", {}).get("count"):
        return "The base model has no list of blocks, so it can't be sharded"
    return None


def reason(group: DeviceGroup, demand: Demand) -> str:
    """Return a sentence that explains how the group holds the base model of such a job."""
    if group.gang is not None:
        return f"Each device of gang {group.gang} holds a full replica of the base model: gangs do not shard."
    if group.num_devices == 1:
        return "The worker has one device, which holds the full base model."
    holding, is_auto = group.holding(demand), group.wanted == "auto"
    capacity = f"the smallest of {group.num_devices} devices has {readable(group.bytes_of_each)}"
    whole = _about(group, demand, "replicated")
    if holding == "replicated":
        if not is_auto:
            return f"LORRY_STRATEGY is replicated: each of {group.num_devices} devices holds a full replica."
        return f"Each device holds a full replica of the base model: the job needs {whole} per device, and {capacity}."
    cause = f"A full replica of the base model would need {whole} per device, and {capacity}"
    if holding == "offloaded":
        sharded = _about(group, demand, "sharded")
        cause = f"Sharding the base model across the devices would need {sharded} per device, and {capacity}"
    if not is_auto:
        cause = f"LORRY_STRATEGY is {group.wanted}"
    host_note = (
        f" with shards in host memory ({_size(demand.shardable_bytes)} in total)" if holding == "offloaded" else ""
    )
    need = _about(group, demand, holding)
    return f"{cause}. Sharding across {group.num_devices} devices{host_note} needs {need} per device."


def _size(num_bytes: int) -> str:
    return f"about {readable(num_bytes)}"


def _about(group: DeviceGroup, demand: Demand, holding: ShardingStrategy) -> str:
    return _size(group.allocated_bytes(demand, holding) + group.reserve_bytes)


def explain_misfit(found: Sequence[tuple[DeviceGroup, Demand]], hindrance: str | None) -> str | None:
    """Return why such a job fits none of these groups; None if it fits one. `hindrance`: see `hindrance()`."""
    if any(group.needed_bytes(demand) <= group.bytes_of_each for group, demand in found):
        return None
    group, demand = max(found, key=lambda pair: pair[0].bytes_of_each)
    parts = [_why_not(group, demand)]
    if hindrance is not None and any(group.shards_when != "never" for group, _ in found):
        parts.append(f"{hindrance}.")
    return " ".join(parts)


def _why_not(group: DeviceGroup, demand: Demand) -> str:
    """Return why the job does not fit the largest worker."""
    holding, capacity = group.holding(demand), readable(group.bytes_of_each)
    if holding == "replicated":
        need = _about(group, demand, holding)
        if group.smallest is not None:
            smallest = f"the smallest worker of gang {group.gang}, {group.smallest}, has {capacity}"
            return f"The job needs {need} per device, but {smallest}."
        return f"The job needs {need}, but the largest worker has {capacity}."
    if not demand.shardable_bytes:
        return f"The largest worker always shards base models across its devices (LORRY_STRATEGY is {group.wanted})."
    among = f"Sharding across the {group.num_devices} devices of the largest worker"
    if holding == "offloaded" and demand.shardable_bytes > group.host_limit_bytes:
        return f"{among} would need {_too_much_for_host(group, demand)}"
    host_note = ", with shards in host memory," if holding == "offloaded" else ""
    need = _about(group, demand, holding)
    sentence = f"{among}{host_note} needs {need} per device, but the smallest device has {capacity}."
    would_fit = group.allocated_bytes(demand, "offloaded") <= group.usable_bytes
    if group.shards_when == "needed" and holding == "sharded" and would_fit:
        fits = _about(group, demand, "offloaded")
        sentence += (
            f" With shards in host memory it would need {fits} per device and {_too_much_for_host(group, demand)}"
        )
    return sentence


def _too_much_for_host(group: DeviceGroup, demand: Demand) -> str:
    of_host = readable(group.host_limit_bytes)
    return f"{_size(demand.shardable_bytes)} of host memory, of which a base model may use {of_host}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """GPUs on which a job could be trained."""

    num_devices: int
    card: Card
    host_bytes: int = 0
    """Host memory for the shards of the base model."""


def would_fit(demand: Demand) -> list[Fit]:
    """Return the smallest common GPU on which such a job could be trained, and groups of smaller GPUs.

    The last group is two GPUs with the shards in host memory. More GPUs would need hardly less memory each.
    """
    found: list[Fit] = []
    ways = [(count, 0) for count in COUNTS] + [(2, demand.shardable_bytes)]
    for count, host_bytes in ways if demand.shardable_bytes else ways[:1]:
        card = next((card for card in CARDS if _fits(demand, count, card, host_bytes)), None)
        fewer = [fit.card.gigabytes for fit in found if fit.num_devices <= count]
        if card is not None and card.gigabytes < min(fewer, default=card.gigabytes + 1):
            found.append(Fit(num_devices=count, card=card, host_bytes=host_bytes))
    return found


def _fits(demand: Demand, count: int, card: Card, host_bytes: int) -> bool:
    group = DeviceGroup(kind="cuda", num_devices=count, bytes_of_each=card.memory_bytes, host_bytes=host_bytes)
    return group.needed_bytes(demand) <= card.memory_bytes


def would_fit_sentence(found: Sequence[Fit]) -> str:
    """Return a sentence such as: It would fit on one GPU with 141 GB, or on 2 GPUs with 80 GB each."""
    if not found:
        return "It would fit on no common GPU, and on no group of up to 8 GPUs."
    return f"It would fit {', or '.join(map(_fit_text, found))}."


def _fit_text(fit: Fit) -> str:
    if fit.num_devices == 1:
        return f"on one GPU with {fit.card.gigabytes} GB"
    with_host = f" and {readable(fit.host_bytes)} of host memory for the base model" if fit.host_bytes else ""
    return f"on {fit.num_devices} GPUs with {fit.card.gigabytes} GB each{with_host}"
