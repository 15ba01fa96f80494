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
    """Provides a twin of `adapter` with its own gradient to each slice except the first.

    An idle twin keeps its views but frees its memory. There are as many twins as slices in the widest tick so far, so
    a resident job that is not in the tick uses no memory for them.
    """

    adapter: FlatAdapter
    ranks: Ranks = ALONE
    holder: int | None = None
    """Rank that holds the partial sum. None before the first slice of a step and after `complete`."""
    lent: dict[int, FlatAdapter] = field(default_factory=dict)
    idle: list[FlatAdapter] = field(default_factory=list)

    def adapter_of(self, slice_index: int) -> FlatAdapter:
        """Return the adapter into which the gradient of this slice is accumulated, the same one on every call."""
        if slice_index == 0:
            return self.adapter
        if slice_index not in self.lent:
            self.lent[slice_index] = _filled(self.idle.pop()) if self.idle else with_own_gradient(self.adapter)
        return self.lent[slice_index]

    def collect(self, first: int, ranks_of_slices: Sequence[int]) -> None:
        """Add the gradients of the slices from number `first` on, in order. `ranks_of_slices` computed them."""
        parts: list[tuple[int, Tensor | None]] = []
        for index, rank in enumerate(ranks_of_slices, start=first):
            twin = self.lent.pop(index, None)
            parts.append((rank, None if twin is None else twin.g))
            if twin is not None:
                self.idle.append(twin)
        self.holder = self.ranks.carry(self.adapter.g, holder=self.holder, parts=parts)
        for twin in self.idle:
            twin.g.untyped_storage().resize_(0)

    def complete(self) -> None:
        """Distribute the sum of the whole step to every rank."""
        self.ranks.spread(self.adapter.g, holder=self.holder)
        self.holder = None

    def drop(self) -> None:
        """Discard all gradients, including the adapter's own, and free their memory."""
        self.adapter.g.zero_()
        self.holder = None
        self.lent.clear()
        self.idle.clear()

    @property
    def num_bytes(self) -> int:
        return sum(twin.g.untyped_storage().nbytes() for twin in (*self.lent.values(), *self.idle))


def _filled(twin: FlatAdapter) -> FlatAdapter:
    twin.g.untyped_storage().resize_(twin.g.nbytes)
    twin.g.zero_()
    return twin


def with_own_gradient(adapter: FlatAdapter) -> FlatAdapter:
    """Return an adapter that shares the weights of `adapter` and has its own zero gradient."""
    twin = copy(adapter)
    twin.g = torch.zeros_like(adapter.g)
    twin.joints = {}
    twin.sites = {name: _moved(views, adapter.g, twin.g) for name, views in adapter.sites.items()}
    twin.tensors = {name: _moved(views, adapter.g, twin.g) for name, views in adapter.tensors.items()}
    return twin


def _moved(views: Any, old: Tensor, new: Tensor) -> Any:
    """Return `views` in which each tensor inside `old` points to the same offset of `new`."""
    changes: dict[str, Any] = {}
    for part in fields(views):
        value = getattr(views, part.name)
        if isinstance(value, Tensor) and _lies_in(value, old):
            offset = value.storage_offset() - old.storage_offset()
            changes[part.name] = new.as_strided(value.shape, value.stride(), offset)
        elif is_dataclass(value):
            changes[part.name] = _moved(value, old, new)
    return replace(views, **changes)


def _lies_in(view: Tensor, vector: Tensor) -> bool:
    same = view.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()
    return same and 0 <= view.storage_offset() - vector.storage_offset() < vector.numel()
