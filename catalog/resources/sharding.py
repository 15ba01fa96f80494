"""How the devices of a group hold a base model: each the whole of it, or a share of every block, on the device or in
its host's memory. Pure; bytes of one device.

Which it is follows from the job and the group alone, never from what is free or who else trains: so what a job ends
with tells neither. lora_core/base_model/sharding.py divides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from catalog.resources.gpus import CARDS, CUDA_BYTES, Card
from catalog.resources.memory import BYTES_PER_NUMBER, readable
from catalog.spec.lora import begins_with_the_base

Strategy = Literal["replicated", "fsdp2", "zero3", "fsdp2_offload", "zero3_offload"]
Wanted = Literal["auto", "replicated", "fsdp2", "zero3", "fsdp2_offload", "zero3_offload"]
"""What an operator has set for a worker."""
ShardingStrategy = Literal["replicated", "sharded", "offloaded"]
"""On each device all of the base; or of each block a share, there or in the memory of its host."""
ShardsWhen = Literal["never", "needed", "always", "offloaded"]
"""The last: always, with the shares in the host's memory."""

GATHERED_BLOCKS = 3
"""Blocks that a device holds whole at one time: the one that computes, and the next one twice, as it comes from the
others and as it is laid out."""
NCCL_BYTES = 2**30
"""Buffers by which the GPUs of a group talk: supposed, not measured here."""
HOST_PART = 0.9
"""Of the host's memory that shares may be in, beside what processes of trainers take; the rest is for all else."""
HOST_PROCESS_BYTES = 2**32
"""That a process of a trainer on a GPU takes of its host: supposed, not measured here."""
NEVER = 2**62
"""Bytes of what a group can't train at all."""
COUNTS = (1, 2, 4, 8)
"""GPUs of a machine, as they are sold and rented."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What a job needs of a device that holds the whole base, with a trainer to itself."""

    whole_bytes: int
    shardable_bytes: int = 0
    """Of that, the blocks, of which each of several devices may have a share. 0: the job needs them whole."""
    gathered_bytes: int = 0
    """Blocks that a device then holds whole at one time beside its share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceGroup:
    """The devices that the trainers of one worker run on, with a process on each."""

    kind: str = "cpu"
    num_devices: int = 1
    bytes_of_each: int = 0
    """Of the smallest."""
    wanted: Wanted = "auto"
    gang: str | None = None
    """That the worker is of: its trainers run on the devices of others too."""
    smallest: str | None = None
    """Worker of that gang whose memory the bytes are, where others were looked at."""
    host_bytes: int = 0
    """Of a base that may be in the memory of its host. 0 of a CPU, whose memory that is already."""

    @property
    def shards_when(self) -> ShardsWhen:
        """One device has nobody to divide with, and over nodes no base is divided: a job would be held in another way
        where another one leads."""
        if self.gang is not None or self.num_devices == 1 or self.wanted == "replicated":
            return "never"
        if self.wanted == "auto":
            return "needed"
        return "offloaded" if self.wanted.endswith("_offload") else "always"

    @property
    def reserve_bytes(self) -> int:
        """That CUDA and NCCL take of each of several GPUs. Of one what is free is looked at, as ever."""
        are_several = self.num_devices > 1 or self.gang is not None
        return CUDA_BYTES + NCCL_BYTES if self.kind == "cuda" and are_several else 0

    @property
    def usable_bytes(self) -> int:
        return self.bytes_of_each - self.reserve_bytes

    @property
    def host_limit_bytes(self) -> int:
        """Of a CPU none where an operator has it offload: the shares stay in the memory that they were in."""
        return NEVER if self.kind == "cpu" and self.shards_when == "offloaded" else self.host_bytes

    def holding(self, demand: Demand) -> ShardingStrategy:
        """How the base is held for such a job: in the first of the three ways in which it fits."""
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
        told = {"replicated": "replicated", "sharded": library, "offloaded": f"{library}_offload"}[holding]
        return cast(Strategy, told)

    def needed_bytes(self, demand: Demand) -> int:
        """On each device, by the way in which the job is trained there. NEVER where it can't be."""
        holding = self.holding(demand)
        is_barred = holding != "replicated" and not demand.shardable_bytes
        if is_barred or (holding == "offloaded" and demand.shardable_bytes > self.host_limit_bytes):
            return NEVER
        return self.allocated_bytes(demand, holding) + self.reserve_bytes

    def allocated_bytes(self, demand: Demand, holding: ShardingStrategy) -> int:
        """Of that what the trainer's own is, where the base is held so."""
        if holding == "replicated":
            return demand.whole_bytes
        return demand.whole_bytes - demand.shardable_bytes + sum(self.block_parts(demand, holding).values())

    def block_parts(self, demand: Demand, holding: ShardingStrategy) -> dict[str, int]:
        """What a device holds of the blocks of a base that is not whole. From the host a block's share comes to the
        device before all gather it."""
        share, gathered = self.share_bytes(demand), demand.gathered_bytes
        if holding == "sharded":
            return {"base_share": share, "gathered_blocks": gathered}
        coming = math.ceil(gathered / (GATHERED_BLOCKS * self.num_devices))
        return {"base_share": share * self.keeps_shares, "gathered_blocks": gathered, "coming_share": coming}

    def share_bytes(self, demand: Demand) -> int:
        """Of the blocks, that is of each device all the time."""
        return math.ceil(demand.shardable_bytes / self.num_devices)

    @property
    def keeps_shares(self) -> bool:
        """Its devices and their host have one memory."""
        return self.kind == "cpu"


SINGLE = DeviceGroup()


def reported_group(devices: Sequence[Mapping[str, Any]], memory_bytes: int) -> DeviceGroup:
    """Of a worker's record; those of older workers say nothing of it, and hold whole bases."""
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
    """Of a base that may be in the memory of a host. memory_bytes: of the host's memory the part of these processes."""
    return max(0, int(HOST_PART * memory_bytes) - num_processes * HOST_PROCESS_BYTES)


def block_bytes(description: Mapping[str, Any], precision: str) -> tuple[int, int]:
    """(All blocks, of which each device may have a share; those that one holds whole at one time beside its share).
    Embeddings, head and final norm are in no block.
    """
    blocks, width = description["blocks"], BYTES_PER_NUMBER[precision]
    return blocks["num_parameters"] * width, GATHERED_BLOCKS * blocks["largest_parameters"] * width


def hindrance(lora: Mapping[str, Any], quantization: str, description: Mapping[str, Any]) -> str | None:
    """Why a job can't be trained on a divided base; the beginning of a sentence. None where it can."""
    if quantization != "none":
        return f"A base held as {quantization} is not divided"
    if lora.get("use_dora"):
        return "DoRA reads the base's weights, of which each device of several would hold a share"
    start = lora.get("init_lora_weights")
    if begins_with_the_base(start):
        return f"{start} decomposes the base's weights, of which each device of several would hold a share"
    if "blocks" not in description:
        return "The base was imported before its blocks were counted, which a worker that has its files is still to do"
    if not description["blocks"]["count"]:
        return "The base has no list of blocks that could be divided"
    return None


def reason(group: DeviceGroup, demand: Demand) -> str:
    """Why a group holds the base of such a job as it does."""
    if group.gang is not None:
        return f"Each device of the gang {group.gang} holds the whole base: over nodes it is not divided."
    if group.num_devices == 1:
        return "There is one device, which holds the whole base."
    holding, is_auto = group.holding(demand), group.wanted == "auto"
    there = f"the smallest of {group.num_devices} devices has {readable(group.bytes_of_each)}"
    whole = _about(group, demand, "replicated")
    if holding == "replicated":
        if not is_auto:
            return f"LORRY_STRATEGY is replicated: each of {group.num_devices} devices holds the whole base."
        return f"Each device holds the whole base: the job needs {whole}, and {there}."
    told = f"With the whole base the job would need {whole} on each device, and {there}"
    if holding == "offloaded":
        divided = _about(group, demand, "sharded")
        told = f"With a share of every block the job would need {divided} on each device, and {there}"
    if not is_auto:
        told = f"LORRY_STRATEGY is {group.wanted}"
    where = f" in the host's memory, {_size(demand.shardable_bytes)} in all" if holding == "offloaded" else ""
    need = _about(group, demand, holding)
    return f"{told}: each of {group.num_devices} devices holds a share of every block{where}, and needs {need}."


def _size(num_bytes: int) -> str:
    return f"about {readable(num_bytes)}"


def _about(group: DeviceGroup, demand: Demand, holding: ShardingStrategy) -> str:
    return _size(group.allocated_bytes(demand, holding) + group.reserve_bytes)


def nowhere(found: Sequence[tuple[DeviceGroup, Demand]], hindrance: str | None) -> str | None:
    """Why such a job fits none of these groups; None where it fits one. hindrance: what bars it from a divided base."""
    if any(group.needed_bytes(demand) <= group.bytes_of_each for group, demand in found):
        return None
    group, demand = max(found, key=lambda pair: pair[0].bytes_of_each)
    parts = [_why_not(group, demand)]
    if hindrance is not None and any(group.shards_when != "never" for group, _ in found):
        parts.append(f"{hindrance}.")
    return " ".join(parts)


def _why_not(group: DeviceGroup, demand: Demand) -> str:
    """Why it doesn't fit the largest worker."""
    holding, held = group.holding(demand), readable(group.bytes_of_each)
    if holding == "replicated":
        need = _about(group, demand, holding)
        if group.smallest is not None:
            smallest = f"the smallest worker of the gang {group.gang}, {group.smallest}, has {held}"
            return f"It needs {need} on each device, and {smallest}."
        return f"It needs {need} and the largest worker has {held}."
    if not demand.shardable_bytes:
        return f"The largest worker divides every base among its devices (LORRY_STRATEGY is {group.wanted})."
    among = f"Divided among the {group.num_devices} devices of the largest worker"
    if holding == "offloaded" and demand.shardable_bytes > group.host_limit_bytes:
        return f"{among} it would need {_too_much_for_host(group, demand)}"
    where = ", with the shares in the host's memory," if holding == "offloaded" else ""
    need = _about(group, demand, holding)
    told = f"{among}{where} it needs {need} on each, and the smallest of them has {held}."
    would_fit = group.allocated_bytes(demand, "offloaded") <= group.usable_bytes
    if group.shards_when == "needed" and holding == "sharded" and would_fit:
        fits = _about(group, demand, "offloaded")
        told += f" Held by the host it would need {fits} on each, and {_too_much_for_host(group, demand)}"
    return told


def _too_much_for_host(group: DeviceGroup, demand: Demand) -> str:
    of_host = readable(group.host_limit_bytes)
    return f"{_size(demand.shardable_bytes)} of the host's memory, where a base may take {of_host}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What a job could be trained on."""

    num_devices: int
    card: Card
    host_bytes: int = 0
    """Of the host's memory, for the shares of the base."""


def would_fit(demand: Demand) -> list[Fit]:
    """The smallest common GPU that such a job could be trained on, groups of smaller ones, and at last two that are
    enough where the shares are in the host's memory: more of those need hardly less each."""
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
    return group.needed_bytes(demand) + (CUDA_BYTES if count == 1 else 0) <= card.memory_bytes


def would_fit_sentence(found: Sequence[Fit]) -> str:
    """Such as: It would fit one GPU of 141 GB, or a group of 2 of 80 GB."""
    if not found:
        return "No common GPU holds it, nor a group of 8."
    return f"It would fit {', or '.join(map(_fit_text, found))}."


def _fit_text(fit: Fit) -> str:
    if fit.num_devices == 1:
        return f"one GPU of {fit.card.gigabytes} GB"
    with_host = f" with {readable(fit.host_bytes)} of the host's memory for the base" if fit.host_bytes else ""
    return f"a group of {fit.num_devices} of {fit.card.gigabytes} GB{with_host}"
