# pyright: basic
"""Copies between host and device in one transfer per call, however many arrays or tensors it takes.

A copy from pageable memory, and each value that the host reads, makes the host wait for everything that the device
has still to compute. An upload therefore goes through pinned memory, and the device receives it in its own order.
"""

from collections.abc import Sequence
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
class NamedVectors:
    """Contiguous vectors, all on one device, or lasting copies of them on the host."""

    vectors: dict[str, Tensor]
    copied: torch.cuda.Event | None = None
    """The device has written the copies. None: there is nothing to wait for."""

    def lasting(self) -> "NamedVectors":
        """Begin to copy the vectors to the host, where they keep the current values. Raises torch.OutOfMemoryError.

        On a GPU the host does not wait: the device copies to pinned memory in the order of its current stream, so later
        operations may overwrite or free the vectors at once.
        """
        device = next(iter(self.vectors.values())).device
        with shortage_named():
            if device.type != "cuda":
                return NamedVectors(vectors={name: vector.clone() for name, vector in self.vectors.items()})
            copies = {name: _pinned_copy(vector) for name, vector in self.vectors.items()}
            copied = torch.cuda.Event(blocking=True)
            copied.record(torch.cuda.current_stream(device))
            return NamedVectors(vectors=copies, copied=copied)

    def on_host(self) -> dict[str, Tensor]:
        """Return the vectors in host memory. On a CPU these are no copies. Raises torch.OutOfMemoryError.

        Lasting copies may be read in any thread.
        """
        if self.copied is not None:
            self.copied.synchronize()
        with shortage_named():
            return {name: vector.cpu() for name, vector in self.vectors.items()}


def _pinned_copy(vector: Tensor) -> Tensor:
    return torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True).copy_(vector, non_blocking=True)


def release_pinned_memory() -> bool:
    """Return pinned memory that no tensor uses to the system. The device may have to wait.

    torch keeps this memory for later copies. Returns False on a CPU, and for versions of torch that can't release it.
    """
    release = getattr(torch.accelerator, "empty_host_cache", None)
    if release is None or not torch.cuda.is_initialized():
        return False
    release()
    return True
