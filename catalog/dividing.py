"""How the devices of a group hold a base model: each the whole of it, or a share of every block. Pure; bytes of one
device.

Which it is follows from the job and the group alone, never from what is free or who else trains: so what a job ends
with tells neither. lora_core/sharding.py divides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from catalog.lora_spec import begins_with_the_base
from catalog.memory import BYTES_PER_NUMBER, readable
from catalog.planning.devices import CARDS, CUDA_BYTES, Card

Strategy = Literal["replicated", "fsdp2", "zero3"]
Wanted = Literal["auto", "replicated", "fsdp2", "zero3"]
"""What an operator has set for a worker."""
DividesWhen = Literal["never", "needed", "always"]

GATHERED_BLOCKS = 3
"""Blocks that a device holds whole at one time: the one that computes, and the next one twice, as it comes from the
others and as it is laid out."""
NCCL_BYTES = 2**30
"""Buffers by which the GPUs of a group talk: supposed, not measured here."""
NEVER = 2**62
"""Bytes of what a group can't train at all."""
COUNTS = (1, 2, 4, 8)
"""GPUs of a machine, as they are sold and rented."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What a job needs of a device that holds the whole base, with a trainer to itself."""

    whole_bytes: int
    divisible_bytes: int = 0
    """Of that, the blocks, of which each of several devices may have a share. 0: the job needs them whole."""
    gathered_bytes: int = 0
    """Blocks that a device then holds whole at one time beside its share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
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

    @property
    def divides_when(self) -> DividesWhen:
        """One device has nobody to divide with, and over nodes no base is divided: a job would be held in another way
        where another one leads."""
        if self.gang is not None or self.num_devices == 1 or self.wanted == "replicated":
            return "never"
        return "needed" if self.wanted == "auto" else "always"

    @property
    def reserve_bytes(self) -> int:
        """That CUDA and NCCL take of each of several GPUs. Of one what is free is looked at, as ever."""
        are_several = self.num_devices > 1 or self.gang is not None
        return CUDA_BYTES + NCCL_BYTES if self.kind == "cuda" and are_several else 0

    @property
    def usable_bytes(self) -> int:
        return self.bytes_of_each - self.reserve_bytes

    def divides(self, demand: Demand) -> bool:
        """Whether such a job is trained on a divided base."""
        if self.divides_when == "needed":
            return demand.divisible_bytes > 0 and demand.whole_bytes > self.usable_bytes
        return self.divides_when == "always"

    def strategy(self, demand: Demand) -> Strategy:
        if not self.divides(demand):
            return "replicated"
        return "zero3" if self.wanted == "zero3" else "fsdp2"

    def needed_bytes(self, demand: Demand) -> int:
        """On each device, by the way in which the job is trained there. NEVER where it can't be."""
        if not self.divides(demand):
            return demand.whole_bytes + self.reserve_bytes
        return self.divided_bytes(demand) + self.reserve_bytes if demand.divisible_bytes else NEVER

    def divided_bytes(self, demand: Demand) -> int:
        """Of that what the trainer's own is, where the base is divided."""
        return demand.whole_bytes - demand.divisible_bytes + self.share_bytes(demand) + demand.gathered_bytes

    def share_bytes(self, demand: Demand) -> int:
        """Of the blocks, that each device holds all the time."""
        return math.ceil(demand.divisible_bytes / self.num_devices)


ONE = Group()


def group_told(devices: Sequence[Mapping[str, Any]], memory_bytes: int) -> Group:
    """Of a worker's record; those of older workers say nothing of it, and hold whole bases."""
    first: Mapping[str, Any] = devices[0] if devices else {}
    return Group(
        kind=first.get("kind", "cpu"),
        num_devices=int(first.get("num_processes") or len(first.get("indices") or ()) or 1),
        bytes_of_each=memory_bytes,
        wanted=first.get("strategy", "replicated"),
        gang=first.get("gang"),
    )


def block_bytes(description: Mapping[str, Any], precision: str) -> tuple[int, int]:
    """(All blocks, of which each device may have a share; those that one holds whole at one time beside its share).
    Embeddings, head and final norm are in no block.
    """
    blocks, width = description["blocks"], BYTES_PER_NUMBER[precision]
    return blocks["num_parameters"] * width, GATHERED_BLOCKS * blocks["largest_parameters"] * width


def divided_parts(base_bytes: int, *, divisible_bytes: int, gathered_bytes: int, num_devices: int) -> dict[str, int]:
    """What one device holds of a divided base, by what it is."""
    return {
        "undivided": base_bytes - divisible_bytes,
        "base_share": math.ceil(divisible_bytes / num_devices),
        "gathered_blocks": gathered_bytes,
    }


def hindrance(lora: Mapping[str, Any], quantisation: str, description: Mapping[str, Any]) -> str | None:
    """Why a job can't be trained on a divided base; the beginning of a sentence. None where it can."""
    if quantisation != "none":
        return f"A base held as {quantisation} is not divided"
    if lora.get("use_dora"):
        return "DoRA reads the base's weights, of which each device of several would hold a share"
    start = lora.get("init_lora_weights")
    if begins_with_the_base(start):
        return f"{start} decomposes the base's weights, of which each device of several would hold a share"
    if "blocks" not in description:
        return "The base was imported before its blocks were counted, and is not divided until it is added again"
    if not description["blocks"]["count"]:
        return "The base has no list of blocks that could be divided"
    return None


def reason(group: Group, demand: Demand) -> str:
    """Why a group holds the base of such a job as it does."""
    if group.gang is not None:
        return f"Each device of the gang {group.gang} holds the whole base: over nodes it is not divided."
    if group.num_devices == 1:
        return "There is one device, which holds the whole base."
    whole = f"about {readable(demand.whole_bytes + group.reserve_bytes)}"
    there = f"the smallest of {group.num_devices} devices has {readable(group.bytes_of_each)}"
    if not group.divides(demand):
        if group.wanted == "replicated":
            return f"LORRY_STRATEGY is replicated: each of {group.num_devices} devices holds the whole base."
        return f"Each device holds the whole base: the job needs {whole}, and {there}."
    told = f"With the whole base the job would need {whole} on each device, and {there}"
    if group.divides_when == "always":
        told = f"LORRY_STRATEGY is {group.wanted}"
    need = readable(group.needed_bytes(demand))
    return f"{told}: each of {group.num_devices} devices holds a share of every block, and needs about {need}."


def nowhere(found: Sequence[tuple[Group, Demand]], hindrance: str | None) -> str | None:
    """Why such a job fits none of these groups; None where it fits one. hindrance: what bars it from a divided base."""
    if any(group.needed_bytes(demand) <= group.bytes_of_each for group, demand in found):
        return None
    group, demand = max(found, key=lambda pair: pair[0].bytes_of_each)
    need, held = group.needed_bytes(demand), readable(group.bytes_of_each)
    parts: list[str] = []
    if need == NEVER:
        parts.append(f"The largest worker divides every base among its devices (LORRY_STRATEGY is {group.wanted}).")
    elif group.divides(demand):
        parts.append(
            f"Divided among the {group.num_devices} devices of the largest worker it needs about {readable(need)} on "
            f"each, and the smallest of them has {held}."
        )
    elif group.smallest is not None:
        smallest = f"the smallest worker of the gang {group.gang}, {group.smallest}, has {held}"
        parts.append(f"It needs about {readable(need)} on each device, and {smallest}.")
    else:
        parts.append(f"It needs about {readable(need)} and the largest worker has {held}.")
    if hindrance is not None and any(group.divides_when != "never" for group, _ in found):
        parts.append(f"{hindrance}.")
    return " ".join(parts)


def would_fit(demand: Demand) -> list[tuple[int, Card]]:
    """The smallest common GPU that such a job could be trained on, and groups of smaller ones: how many, of which."""
    found: list[tuple[int, Card]] = []
    for count in COUNTS if demand.divisible_bytes else COUNTS[:1]:
        card = next((card for card in CARDS if _fits(demand, count, card)), None)
        if card is not None and (not found or card.gigabytes < found[-1][1].gigabytes):
            found.append((count, card))
    return found


def _fits(demand: Demand, count: int, card: Card) -> bool:
    group = Group(kind="cuda", num_devices=count, bytes_of_each=card.memory_bytes)
    return group.needed_bytes(demand) + (CUDA_BYTES if count == 1 else 0) <= card.memory_bytes


def would_fit_sentence(found: Sequence[tuple[int, Card]]) -> str:
    """Such as: It would fit one GPU of 141 GB, or a group of 2 of 80 GB."""
    if not found:
        return "No common GPU holds it, nor a group of 8."
    told = [
        f"one GPU of {card.gigabytes} GB" if count == 1 else f"a group of {count} of {card.gigabytes} GB"
        for count, card in found
    ]
    return f"It would fit {', or '.join(told)}."
