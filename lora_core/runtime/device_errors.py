# pyright: basic
"""One exception for memory that ran out, in whichever way the allocator that wanted it says so."""

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from lora_core.errors import BrokenPass, OutOfMemory, Part

SIGNS = ("can't allocate memory", "bad_alloc", "_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
"""torch's allocator on a CPU, C++'s own, cuBLAS and cuDNN, and the driver of a GPU past torch's allocator raise another
RuntimeError with one of these in it."""


def is_shortage(error: BaseException) -> bool:
    """Whether memory ran out, in whichever way it is said."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@contextmanager
def shortage_named() -> Iterator[None]:
    """Within the block, memory that runs out is torch.OutOfMemoryError: on a CPU as well, and in NumPy."""
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
    """Memory that runs out within the block is wanted by that part of `job` alone: OutOfMemory in its name."""
    try:
        with shortage_named():
            yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(job, part=part) from error


@contextmanager
def shortage_in_pass(*, is_sharded: bool) -> Iterator[None]:
    """`shortage_named` for a block in which there is a pass through the base: of one that is divided BrokenPass."""
    try:
        with shortage_named():
            yield
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        if is_sharded:
            raise BrokenPass from error
        raise


FAULT_SIGNS = ("CUDA error", "CUDA driver error", "Triton Error", "_STATUS_", "device-side assert", "HIP error")
"""In messages of torch, of Triton, and of cuBLAS, cuDNN, cuSOLVER and cuSPARSE, which raise a plain RuntimeError."""


def is_device_fault(error: BaseException) -> bool:
    """Whether the device itself failed: most often this process can compute nothing on it from then on. Memory that
    ran out is none: device_errors.py knows that."""
    if is_shortage(error):
        return False
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in FAULT_SIGNS)
    return told or isinstance(error, torch.AcceleratorError)


@contextmanager
def interrupts_wait() -> Generator[None]:
    """What Ctrl-C does is done at the end of the block, for what is half written in it can't be taken back.

    Signals come to the main thread alone, so in any other nothing is to be done.
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
