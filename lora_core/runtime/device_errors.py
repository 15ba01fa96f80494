# pyright: basic
"""One exception for memory that ran out, in whichever way the allocator that wanted it says so."""

from collections.abc import Iterator
from contextlib import contextmanager

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
def shortage_in_pass(*, is_divided: bool) -> Iterator[None]:
    """`shortage_named` for a block in which there is a pass through the base: of one that is divided BrokenPass."""
    try:
        with shortage_named():
            yield
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        if is_divided:
            raise BrokenPass from error
        raise
