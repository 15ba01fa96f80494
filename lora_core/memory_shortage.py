# pyright: basic
"""One exception for memory that ran out, in whichever way the allocator that wanted it says so."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lora_core.errors import OutOfMemory, Part

SIGNS = ("can't allocate memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
"""torch's allocator on a CPU, C++'s own, and cuBLAS raise a plain RuntimeError with one of these in it."""


@contextmanager
def shortage_named() -> Iterator[None]:
    """Within the block, memory that runs out is torch.OutOfMemoryError: on a CPU as well, and in NumPy."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS):
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
