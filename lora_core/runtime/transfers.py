# pyright: basic
"""Copies between host and device: each call makes one, however many arrays or tensors it takes.

A copy from pageable memory, and each value that the host reads, makes the host wait for everything that the device
has still to compute. An upload therefore goes through pinned memory, and the device receives it in its own order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_core.runtime.device_errors import shortage_named

ALIGNMENT_BYTES = 16
"""Each array starts at a multiple of it, as kernels require that read several numbers at a time."""


def upload(arrays: Sequence[np.ndarray[Any, Any]], device: torch.device | str) -> list[Tensor]:
    """Return a tensor on `device` for each array. On a CPU it shares the array's memory. The host does not wait."""
    device = torch.device(device)
    if device.type == "cpu" or not arrays:
        return [torch.from_numpy(array) for array in arrays]
    content = torch.from_numpy(joined(arrays))
    # torch keeps pinned memory until the device has read it, even if the tensor is freed before.
    copied = (content.pin_memory() if device.type == "cuda" else content).to(device, non_blocking=True)
    return parted(copied, arrays)


def joined(arrays: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Return the bytes of all arrays, uint8. Each array starts at a multiple of ALIGNMENT_BYTES."""
    starts = _starts(arrays)
    content = np.zeros(starts[-1], np.uint8)
    for array, start in zip(arrays, starts, strict=False):
        content[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return content


def parted(content: Tensor, arrays: Sequence[np.ndarray[Any, Any]]) -> list[Tensor]:
    """Return the arrays as views of `content`, wherever the bytes that `joined` returns have been copied."""
    tensors: list[Tensor] = []
    for array, start in zip(arrays, _starts(arrays), strict=False):
        dtype = torch.from_numpy(array).dtype
        part = content[start : start + array.nbytes] if array.size else content.new_empty(0, dtype=dtype)
        tensors.append(part.view(dtype).view(array.shape))
    return tensors


def _starts(arrays: Sequence[np.ndarray[Any, Any]]) -> list[int]:
    sizes = (-(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for array in arrays)
    return list(accumulate(sizes, initial=0))


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor on the host in fp64, exact for fp32, integers below 2^53 and booleans. All are on one device.

    On a device the host waits once.
    """
    if not tensors or tensors[0].device.type == "cpu":
        return [tensor.double() for tensor in tensors]
    is_uniform = len({tensor.dtype for tensor in tensors}) == 1
    flat = torch.cat([tensor.flatten() if is_uniform else tensor.flatten().double() for tensor in tensors])
    flat = flat.double().cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class HostCopies:
    """Copies of vectors on the host, which the device may still have to write."""

    vectors: dict[str, Tensor]
    copied: torch.cuda.Event | None
    """The device has written the copies. None: they are complete."""

    def complete(self) -> dict[str, Tensor]:
        """Return the copies once the device has written them. May be called in any thread."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.vectors


def copy_to_host(vectors: Mapping[str, Tensor], *, is_lasting: bool) -> HostCopies:
    """Begin to copy contiguous vectors, all on one device, to the host.

    `is_lasting` copies keep the current values. On a GPU the host does not wait for them: the device copies to pinned
    memory in the order of its current stream, so later operations may overwrite or free the vectors at once. Other
    copies are complete on return, and on a CPU they share the vectors' memory. Raises torch.OutOfMemoryError.
    """
    device = next(iter(vectors.values())).device
    with shortage_named():
        if device.type == "cuda" and is_lasting:
            copies = {name: _pinned_copy(vector) for name, vector in vectors.items()}
            copied = torch.cuda.Event(blocking=True)
            copied.record(torch.cuda.current_stream(device))
            return HostCopies(vectors=copies, copied=copied)
        is_cloned = device.type == "cpu" and is_lasting
        copies = {name: vector.clone() if is_cloned else vector.cpu() for name, vector in vectors.items()}
        return HostCopies(vectors=copies, copied=None)


def _pinned_copy(vector: Tensor) -> Tensor:
    return torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True).copy_(vector, non_blocking=True)
