# pyright: standard, reportMissingImports=false
"""Counts how often launches in Triton's interpreter load and store each element of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor


class Accesses:
    """The loads or the stores of launches: the number for each element of named tensors, and for all `others`.

    Elements that a mask excludes do not count, and neither do integers, which are words of tables.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        ordered = sorted(tensors.items(), key=lambda item: item[1].data_ptr())
        assert all(tensor.is_contiguous() and tensor.numel() for _, tensor in ordered)
        self._bytes = [tensor.element_size() for _, tensor in ordered]
        self._start = np.array([tensor.data_ptr() for _, tensor in ordered], np.uint64)
        self._stop = self._start + np.array([tensor.nbytes for _, tensor in ordered], np.uint64)
        assert (self._stop[:-1] <= self._start[1:]).all(), "tensors share memory"
        self._numbers = [np.zeros(tensor.shape, np.int64) for _, tensor in ordered]
        self._by_name = {name: numbers for (name, _), numbers in zip(ordered, self._numbers, strict=True)}
        self.others = 0

    def __getitem__(self, name: str) -> NDArray[np.int64]:
        """Return the number of accesses to each element, in the shape of the tensor."""
        return self._by_name[name]

    def add(self, pointers: Any, mask: Any) -> None:
        if not pointers.get_element_ty().is_floating():
            return
        addresses = np.asarray(pointers.data)[np.asarray(mask.data, np.bool_)]
        found = np.searchsorted(self._start, addresses, side="right") - 1
        found[addresses >= self._stop[found]] = -1
        self.others += int((found < 0).sum())
        for index in np.unique(found[found >= 0]).tolist():
            places = (addresses[found == index] - self._start[index]) // self._bytes[index]
            np.add.at(self._numbers[index].reshape(-1), places.astype(np.int64), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPasses:
    """The accesses of launches."""

    loads: Accesses
    stores: Accesses


@contextmanager
def counted_passes(tensors: Mapping[str, Tensor]) -> Iterator[MemoryPasses]:
    """Count the accesses of all launches within the context. An atomic operation fails."""
    from triton.runtime.interpreter import InterpreterBuilder

    passes = MemoryPasses(loads=Accesses(tensors), stores=Accesses(tensors))
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, ptrs: Any, mask: Any, *args: Any, **options: Any) -> Any:
        passes.loads.add(ptrs, mask)
        return load(self, ptrs, mask, *args, **options)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any, **options: Any) -> Any:
        passes.stores.add(ptrs, mask)
        return store(self, ptrs, value, mask, *args, **options)

    def atomic(*_: Any, **__: Any) -> None:
        raise AssertionError("atomic operations are not counted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        patch.setattr(InterpreterBuilder, "create_atomic_cas", atomic)
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", atomic)
        yield passes
