"""DeviceCounts what a pass does on a fake CUDA device: kernel launches, waits of the host, kept bytes, multiplications.

Tensors of the device have sizes but no values, and those of the host have both. An operator that mixes devices raises
an error, as on a GPU. Where the host reads a value, the observer counts a wait and answers with ones.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

FREE = {
    *("view", "t", "transpose", "unsqueeze", "squeeze", "slice", "select", "expand", "as_strided", "detach", "alias"),
    *("permute", "_unsafe_view", "split", "split_with_sizes", "unbind", "_reshape_alias", "lift_fresh", "set_"),
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "is_pinned", "_pin_memory", "resize_"),
}
"""Operators without a kernel: views and allocations."""
LAUNCHES = {
    "_varlen_attn": 2,
    "_varlen_attn_backward": 4,
    "index_put_": 3,  # a sort of the indices among them
    "slice_backward": 2,  # zeros, and a copy
    "select_backward": 2,
}
"""Kernels of an operator, where it has more than one."""
COPIES = ("_to_copy", "copy_")
READS = ("_local_scalar_dense", "equal", "allclose", "nonzero", "is_nonzero", "masked_select", "_unique2")
"""Operators with whose result the host continues, so that it waits for the device."""


@dataclass(kw_only=True)
class DeviceCounts:
    """Operators by (phase, name), the waits of the host by the same key, and multiplications times two by phase."""

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    uploads: Counter[tuple[str, str]] = field(default_factory=Counter)
    downloads: int = 0
    """Copies to pinned memory for which the host does not wait."""
    messages: set[tuple[str, str, str, bool]] = field(default_factory=set)
    """Collectives of torch.distributed: name, devices, dtype, and whether the tensors are contiguous."""
    senders: set[str] = field(default_factory=set)
    """Names of the process groups of these messages."""
    flops: int = 0
    largest_bytes: int = 0
    """Bytes of the largest tensor that was allocated."""
    kept_bytes: int = 0
    """Bytes on the device at the start of the first backward."""
    resident_bytes: int = 0
    """Bytes on the device at the end."""

    def num_launches(self, *phases: str) -> int:
        return sum(count for (phase, _), count in self.launches.items() if not phases or phase in phases)

    @property
    def num_waits(self) -> int:
        return self.waits.total()


class DeviceObserver(TorchDispatchMode):
    """Observes everything in its context. `counting` returns what happened within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = DeviceCounts()
        self.phase = "forward"
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._pinned: set[int] = set()
        self._inside_kernel = 0

    @contextmanager
    def counting(self) -> Iterator[DeviceCounts]:
        self.counts, self.phase = DeviceCounts(), "forward"
        yield self.counts
        self.counts.resident_bytes = self.num_bytes()

    @contextmanager
    def kernel(self, name: str) -> Iterator[None]:
        """Count everything in the block as one launch of a compiled kernel."""
        self.counts.launches[self.phase, name] += 0 if self._inside_kernel else 1
        self._inside_kernel += 1
        try:
            yield
        finally:
            self._inside_kernel -= 1

    def begins_backward(self) -> None:
        self.phase = "backward"
        self.counts.kept_bytes = self.counts.kept_bytes or self.num_bytes()

    def ends_backward(self) -> None:
        self.phase = "update"

    def num_bytes(self) -> int:
        """Return the bytes of all tensors on the device that are alive."""
        self._storages = {key: known for key, known in self._storages.items() if not known[0].expired()}
        return sum(num_bytes for _, num_bytes in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "device":
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_on_device = any(map(_is_on_device, given))
        if func.namespace == "c10d":
            self.counts.messages.add(_message(name, given))
            self.counts.senders.add(_group_name(args))
        if name == "_pin_memory":
            self._pinned.add(given[0].untyped_storage()._cdata)
            return args[0]
        if name == "empty" and kwargs.get("pin_memory"):
            return self._pinned_memory(func, args, kwargs)
        if name in READS and _is_fake(given):
            self._count_wait(name, is_on_device)
            return _ones(name, given, args)
        if not is_on_device and torch.device(kwargs.get("device") or "cpu").type == "cpu" and not _is_fake(given):
            with unset_fake_temporarily():  # the host computes with values
                result = func(*args, **kwargs)
                if name == "allgather_":  # torch's fake process group gathers nothing
                    for output in args[0][0]:
                        output.copy_(args[1][0])
                return result
        result = kwargs["out"] if func is torch.ops.aten.addmm.dtype_out else func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name in COPIES and _crosses(given, made):
            return self._copied(name, given, made, result, args, kwargs)
        if is_on_device or any(map(_is_on_device, made)):
            self._count(func, name, args, kwargs, result)
        for tensor in made:
            self._note(tensor)
        return result

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name in FREE or self._inside_kernel or (made and not any(map(Tensor.numel, made))):
            return
        self.counts.launches[self.phase, name] += _num_launches(name, args)
        if name == "addmm_" or func is torch.ops.aten.addmm.dtype_out:
            self.counts.flops += 2 * args[1].numel() * args[2].shape[1]
        elif func.overloadpacket in flop_registry and "attn" not in name and "attention" not in name:
            self.counts.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)

    def _count_wait(self, name: str, is_on_device: bool) -> None:
        if is_on_device and not self._inside_kernel:
            self.counts.waits[self.phase, name] += 1

    def _copied(
        self, name: str, given: list[Tensor], made: list[Tensor], result: Any, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Count a copy between host and device. A download returns ones."""
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], made[0])
        is_async = bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        on_host = source if _is_on_device(target) else target
        is_pinned = on_host.untyped_storage()._cdata in self._pinned
        if not _is_on_device(target):
            if is_async and is_pinned:
                self.counts.downloads += 1
                return target
            self.counts.waits[self.phase, "download"] += 1
            return _ones(name, given, args, like=target) if name == "_to_copy" else result
        key = self.phase, "upload"
        self.counts.uploads[key] += 1
        # A copy of a number, such as torch.tensor(3.0, device=...), waits just as one of a million numbers does.
        self.counts.waits[key] += 0 if is_async and is_pinned else 1
        self.counts.waits += Counter()  # drop zeros
        self._note(target)
        return result

    def _pinned_memory(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        with unset_fake_temporarily():
            made = func(*args, **kwargs | {"pin_memory": False})
        self._pinned.add(made.untyped_storage()._cdata)
        return made

    def _note(self, tensor: Tensor) -> None:
        if not _is_on_device(tensor):
            return
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None or known[0].expired():
            self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.counts.largest_bytes = max(self.counts.largest_bytes, storage.nbytes())


def _message(name: str, given: list[Tensor]) -> tuple[str, str, str, bool]:
    devices = {"cuda" if _is_on_device(tensor) else "cpu" for tensor in given}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in given}
    is_contiguous = all(tensor.is_contiguous() for tensor in given)
    return name, " ".join(sorted(devices)), " ".join(sorted(dtypes)), is_contiguous


def _group_name(args: tuple[Any, ...]) -> str:
    objects = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
    (group,) = (found for found in objects if str(found._type()).endswith(".ProcessGroup"))
    return dist.ProcessGroup.unbox(group).group_name


def _is_on_device(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"  # faster than asking for its device


def _is_fake(given: list[Tensor]) -> bool:
    return any(isinstance(tensor, FakeTensor) for tensor in given)


def _crosses(given: list[Tensor], made: list[Tensor]) -> bool:
    return len(set(map(_is_on_device, (*given, *made)))) == 2


def _num_launches(name: str, args: tuple[Any, ...]) -> int:
    if not name.startswith("_foreach_"):
        return LAUNCHES.get(name, 1)
    lists = [part for part in args if isinstance(part, (list, tuple))]
    is_fast = all(
        len({(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors}) == 1 and _is_dense(tensors[0])
        for tensors in zip(*lists, strict=True)
    )
    return 1 if is_fast else len(lists[0])  # ForeachUtils.h: can_use_fast_route


def _is_dense(tensor: Tensor) -> bool:
    return is_non_overlapping_and_dense_or_false(tensor)


def _ones(name: str, given: list[Tensor], args: tuple[Any, ...], like: Tensor | None = None) -> Any:
    if like is not None:
        with unset_fake_temporarily():
            return torch.ones(tuple(like.shape), dtype=like.dtype)
    if name in ("equal", "allclose", "is_nonzero"):
        return True
    if name == "_local_scalar_dense":
        return {True: 1.0, False: 1}[given[0].is_floating_point()] if given[0].dtype != torch.bool else True
    if name == "nonzero":
        return given[0].new_zeros((1, given[0].dim()), dtype=torch.int64)
    raise NotImplementedError(f"{name} is not expected in a pass")
