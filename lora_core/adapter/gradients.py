# pyright: basic
"""Gradients of a job's slices that are computed side by side: each slice adds to a vector of its own.

The adapter's gradient is the sum of its slices' in their order, whatever process, lane or tick each was computed in. So
the bits don't tell how many there are. The first slice of a step finds the adapter's vector at zero and may use it.
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
    """Lends a twin of `row` to each slice but the first. An idle one keeps its views and none of its memory: there
    are as many as slices in the widest tick so far, and a resident job that is not in the tick pays for none."""

    adapter: FlatAdapter
    ranks: Ranks = ALONE
    holder: int | None = None
    """The rank that has the sum so far; None before the first slice of a step, and once everybody has it."""
    lent: dict[int, FlatAdapter] = field(default_factory=dict)
    idle: list[FlatAdapter] = field(default_factory=list)

    def adapter_of(self, slice_index: int) -> FlatAdapter:
        """Where the gradient of this slice goes; asking twice gives the same one."""
        if slice_index == 0:
            return self.adapter
        if slice_index not in self.lent:
            self.lent[slice_index] = _filled(self.idle.pop()) if self.idle else with_own_gradient(self.adapter)
        return self.lent[slice_index]

    def collect(self, first: int, ranks_of_slices: Sequence[int]) -> None:
        """Add what the slices from number `first` on have computed, each on its rank; in the order of slices."""
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
        """Every rank has the sum of the whole step."""
        self.ranks.spread(self.adapter.g, holder=self.holder)
        self.holder = None

    def drop(self) -> None:
        """Forget all gradients, those in the adapter as well, and give the memory back."""
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
    """A row with the same weights in the same memory, and a gradient apart, which is zero."""
    twin = copy(adapter)
    twin.g = torch.zeros_like(adapter.g)
    twin.joints = {}
    twin.sites = {name: _moved(views, adapter.g, twin.g) for name, views in adapter.sites.items()}
    twin.tensors = {name: _moved(views, adapter.g, twin.g) for name, views in adapter.tensors.items()}
    return twin


def _moved(views: Any, old: Tensor, new: Tensor) -> Any:
    """`views` with each tensor that lies in `old` at the same place of `new`."""
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
