"""A simulated device. Its tensors compute on the CPU and reject what tensors on a GPU reject.

An operator rejects tensors of `pretend:0` mixed with CPU tensors, except where torch allows it: a tensor without
dimensions, an index, and a copy. The backward runs in a separate thread.
Use it only in a dedicated process, because torch keeps the device registered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

KIND = "pretend"
DEVICE = f"{KIND}:0"
MIXING = ("aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_to_copy")
"""Operators that accept a CPU tensor as one argument."""


class OnDevice(Tensor):
    """A tensor of the device. `held` is the CPU tensor that computes for it."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(DEVICE),
        )
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = OnDevice(self.held.clone())
        memo[id(self)] = found = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        return found

    def tolist(self) -> Any:
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


@contextmanager
def pretending() -> Iterator[None]:
    """Simulate the device within the block."""
    _setup_privateuseone_for_python_backend(KIND, backend_module=_Backend())
    with _Making(), _Computing():
        yield


class _Backend(_DummyBackendModule):
    """Reports autocast types, which checkpointing queries. Autocast is off."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Making(TorchFunctionMode):
    """Creates tensors from Python numbers, because torch creates them on a device before any dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]), *args[2:])
        if func not in (torch.tensor, torch.as_tensor) or options.get("device") is None:
            return func(*args, **options)
        device = options.pop("device")
        return func(*args, **options).to(device)


class _Computing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket._qualified_op_name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    is_ours, held_kwargs = bool(ours), dict(kwargs)
    if kwargs.get("device") is not None:
        is_ours = torch.device(kwargs["device"]).type == KIND
        held_kwargs["device"] = torch.device("cpu")
    elif ours:
        _refuse_mixing(name, tensors)
    held_args, held_kwargs = tree_map(_held, (args, held_kwargs))
    result = func(*held_args, **held_kwargs)
    if not is_ours:
        return result
    result = tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if ours else result


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, OnDevice) else leaf


def _refuse_mixing(name: str, tensors: list[Tensor]) -> None:
    others = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim() > 0]
    if others and name not in MIXING:
        shapes = [tuple(tensor.shape) for tensor in tensors if isinstance(tensor, OnDevice)]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got {shapes} on {DEVICE} and {others} on cpu"
        )
