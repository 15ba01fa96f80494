# pyright: basic
"""Lanes: CPU threads that compute parts of one tick concurrently.

A matmul of a tick is too small for two OpenMP threads, which synchronize every half millisecond. Slices are
independent. Each lane therefore runs its slices with one thread, from embedding to gradient. No lane writes memory that
another reads, so the bits of a slice don't depend on the lanes. If there are fewer parts than cores, such as a single
short slice or answer, the matmuls of each part use several cores (lora_core/kernels/batch_invariant.py).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from threading import Barrier, local
from typing import Any, TypeVar

import torch

from lora_core.runtime.device_errors import interrupts_wait

MIN_LANE_TOKENS = 96
"""Tokens below which another lane isn't worth one more pass over the base model's weights."""

START_SECONDS = 60.0
"""Timeout for starting the threads of all lanes."""

_of_thread = local()

Item = TypeVar("Item")
Result = TypeVar("Result")


def split(sizes: Sequence[int], *, num_lanes: int) -> list[list[int]]:
    """Distribute slices over lanes of about equal size (longest processing time first). Return indices of `sizes`.

    There are at most `num_lanes` lanes, at most one per MIN_LANE_TOKENS tokens, and none is empty. Indices
    within a lane are in order.
    """
    wanted = max(1, min(num_lanes, len(sizes), sum(sizes) // MIN_LANE_TOKENS))
    lanes: list[list[int]] = [[] for _ in range(wanted)]
    filled = [0] * wanted
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        lane = filled.index(min(filled))
        lanes[lane].append(index)
        filled[lane] += sizes[index]
    return [sorted(lane) for lane in lanes]


def num_cores() -> int:
    """Return the number of cores that a matmul of the calling thread may use. 1 except in a part of `Lanes.run`."""
    return getattr(_of_thread, "num_cores", 1)


class Lanes:
    """Thread pool of the lanes.

    `run` waits for every part even if one fails, so that no thread writes to an adapter afterwards. If Ctrl-C
    interrupts the waiting, `wait` resumes it. With more than one lane, torch uses one thread per operation from then
    on, for the whole process.
    """

    def __init__(self, num_lanes: int) -> None:
        self.count = num_lanes
        self._pool = None
        self._others: list[Future[Any]] = []
        if num_lanes > 1:
            torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(num_lanes - 1, thread_name_prefix="lane")
            barrier = Barrier(num_lanes)  # start all threads now: the pool would otherwise start them on demand
            starting = [self._pool.submit(_start, barrier) for _ in range(num_lanes - 1)]
            barrier.wait(START_SECONDS)
            wait(starting)

    def run(self, compute: Callable[[Item], Result], parts: Sequence[Item]) -> list[Result]:
        """Return compute(part) of each part. The first runs in the calling thread. Raises the first part's error."""
        compute = partial(_with_cores, max(1, self.count // max(1, len(parts))), compute)
        if self._pool is None or len(parts) < 2:
            return [compute(part) for part in parts]
        with interrupts_wait():
            for part in parts[1:]:
                self._others.append(self._pool.submit(compute, part))
            others = list(self._others)
        try:
            first = compute(parts[0])
        finally:
            self.wait()
        return [first, *(other.result() for other in others)]

    def wait(self) -> None:
        """Wait for the parts of an interrupted `run`."""
        wait(self._others)
        self._others = []


def _start(barrier: Barrier) -> None:
    torch.set_num_threads(1)  # of this thread: otherwise its first operation sets it to that of another thread
    barrier.wait(START_SECONDS)


def _with_cores(count: int, compute: Callable[[Item], Result], part: Item) -> Result:
    _of_thread.num_cores = count
    try:
        return compute(part)
    finally:
        _of_thread.num_cores = 1
