# pyright: basic
"""Gradients of a job's slices (micro-batches) that are computed concurrently, each into a vector of its own.

The adapter's gradient is the sum over slices in their order, wherever each was computed. The bits of the sum don't
depend on the number of ranks, lanes or ticks. The first slice of a step adds directly to the adapter's zeroed vector.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.distributed.ranks import ALONE, Ranks


@dataclass(kw_only=True, slots=True)
class SliceGradients:
    """Provides a replica of `adapter` with its own gradient to each slice except the first.

    An idle replica keeps its views but frees its memory. There are as many replicas as slices in the widest tick so
    far, so a resident job that is not in the tick uses no memory for them.
    """

    adapter: FlatAdapter
    ranks: Ranks = ALONE
    holder: int | None = None
    """Rank that holds the partial sum. None before the first slice of a step and after `complete`."""
    in_use: dict[int, FlatAdapter] = field(default_factory=dict)
    idle: list[FlatAdapter] = field(default_factory=list)

    def adapter_of(self, slice_index: int) -> FlatAdapter:
        """Return the adapter into which the gradient of this slice is accumulated, the same one on every call."""
        if slice_index == 0:
            return self.adapter
        if slice_index not in self.in_use:
            self.in_use[slice_index] = _reallocated(self.idle.pop()) if self.idle else with_own_gradient(self.adapter)
        return self.in_use[slice_index]

    def collect(self, first: int, ranks_of_slices: Sequence[int]) -> None:
        """Add the gradients of the slices from number `first` on, in order. `ranks_of_slices` computed them."""
        parts: list[tuple[int, Tensor | None]] = []
        for index, rank in enumerate(ranks_of_slices, start=first):
            replica = self.in_use.pop(index, None)
            parts.append((rank, None if replica is None else replica.g))
            if replica is not None:
                self.idle.append(replica)
        self.holder = self.ranks.carry(self.adapter.g, holder=self.holder, parts=parts)
        for replica in self.idle:
            replica.g.untyped_storage().resize_(0)

    def complete(self) -> None:
        """Distribute the sum of the whole step to every rank."""
        self.ranks.spread(self.adapter.g, holder=self.holder)
        self.holder = None

    def drop(self) -> None:
        """Discard all gradients, including the adapter's own, and free their memory."""
        self.adapter.g.zero_()
        self.holder = None
        self.in_use.clear()
        self.idle.clear()

    @property
    def num_bytes(self) -> int:
        return sum(replica.g.untyped_storage().nbytes() for replica in (*self.in_use.values(), *self.idle))


def _reallocated(replica: FlatAdapter) -> FlatAdapter:
    replica.g.untyped_storage().resize_(replica.g.nbytes)
    replica.g.zero_()
    return replica


def with_own_gradient(adapter: FlatAdapter) -> FlatAdapter:
    """Return an adapter that shares the weights of `adapter` and has its own zero gradient."""
    replica = copy(adapter)
    replica.g = torch.zeros_like(adapter.g)
    replica.joints = {}
    replica.sites = {name: _rebased(views, adapter.g, replica.g) for name, views in adapter.sites.items()}
    replica.tensors = {name: _rebased(views, adapter.g, replica.g) for name, views in adapter.tensors.items()}
    return replica


def _rebased(views: Any, old: Tensor, new: Tensor) -> Any:
    """Return `views` in which each tensor inside `old` points to the same offset of `new`."""
    changes: dict[str, Any] = {}
    for part in fields(views):
        value = getattr(views, part.name)
        if isinstance(value, Tensor) and _is_view_of(value, old):
            offset = value.storage_offset() - old.storage_offset()
            changes[part.name] = new.as_strided(value.shape, value.stride(), offset)
        elif is_dataclass(value):
            changes[part.name] = _rebased(value, old, new)
    return replace(views, **changes)


def _is_view_of(view: Tensor, vector: Tensor) -> bool:
    same = view.untyped_storage()._cdata == vector.untyped_storage()._cdata
    return same and 0 <= view.storage_offset() - vector.storage_offset() < vector.numel()
