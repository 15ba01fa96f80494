# pyright: basic
"""Out-of-memory errors of all allocators as one exception, device faults, and deferred interrupts."""

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from lora_core.errors import BrokenPass, OutOfMemory, Part

SIGNS = (
    *("can't allocate memory", "bad_alloc", "_STATUS_ALLOC_FAILED", "CUDA error: out of memory"),
    "Triton Error [CUDA]: out of memory",
)
"""Texts by which the RuntimeErrors of other allocators are recognized: torch on a CPU, C++, cuBLAS and cuDNN, the CUDA
driver outside torch's allocator, and Triton."""


def is_shortage(error: BaseException) -> bool:
    """Return whether the error means out of memory, whichever allocator raised it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@contextmanager
def shortage_named() -> Iterator[None]:
    """Convert any out-of-memory error in the block, also on a CPU or in NumPy, to torch.OutOfMemoryError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        if is_shortage(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


@contextmanager
def shortage_of(job: str, *, part: Part = "adapter") -> Iterator[None]:
    """Convert an out-of-memory error in the block, which allocates for `part` of `job` alone, to OutOfMemory."""
    try:
        with shortage_named():
            yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(job, part=part) from error


@contextmanager
def shortage_in_pass(*, is_sharded: bool) -> Iterator[None]:
    """Like `shortage_named`, for a block with passes through the base model. Raises BrokenPass if it is sharded."""
    try:
        with shortage_named():
            yield
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        if is_sharded:
            raise BrokenPass from error
        raise


FAULT_SIGNS = ("CUDA error", "CUDA driver error", "Triton Error", "_STATUS_", "device-side assert", "HIP error")
"""Parts of the messages of torch, Triton, cuBLAS, cuDNN, cuSOLVER and cuSPARSE, which raise a plain RuntimeError."""


def is_device_fault(error: BaseException) -> bool:
    """Return whether the device itself failed, after which this process usually can't use it any more.

    Out of memory is not a device fault.
    """
    if is_shortage(error):
        return False
    is_reported = isinstance(error, RuntimeError) and any(sign in str(error) for sign in FAULT_SIGNS)
    return is_reported or isinstance(error, torch.AcceleratorError)


@contextmanager
def interrupts_wait() -> Generator[None]:
    """Defer SIGINT (Ctrl-C) to the end of the block, because a half-written update can't be undone.

    Python runs signal handlers in the main thread only, so other threads need no protection.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if came:
            usual(*came[0])
