# pyright: basic
"""Parts of one tick computed side by side on the cores of a CPU, each by a thread of its own.

A matrix product of a tick is too small for two OpenMP threads, which meet at a barrier every half millisecond. Slices,
of different jobs or of one, have nothing to meet for. Each lane runs its slices with one thread from embedding to
gradient; their gradients are disjoint: lanes write nothing that another reads, and a slice has the bits of one alone.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Barrier
from typing import Any, TypeVar

import torch

from lora_core.runtime.device_errors import interrupts_wait

MIN_LANE_TOKENS = 96
"""Tokens below which a further lane isn't worth another pass over the base's weights."""

START_SECONDS = 60.0
"""For a machine to begin the threads of all lanes."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def split(costs: Sequence[int], *, num_tokens: int, num_lanes: int) -> list[list[int]]:
    """Indices of `costs` (of slices) by lane, in their order, lanes about equally full: largest first (LPT).

    At most `num_lanes`, no more than have MIN_LANE_TOKENS of `num_tokens` on average, and none is empty.
    """
    wanted = max(1, min(num_lanes, len(costs), num_tokens // MIN_LANE_TOKENS))
    lanes: list[list[int]] = [[] for _ in range(wanted)]
    filled = [0] * wanted
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        lane = filled.index(min(filled))
        lanes[lane].append(index)
        filled[lane] += costs[index]
    return [sorted(lane) for lane in lanes]


class Lanes:
    """`run` waits for every part, also where one fails: nobody writes into a row afterwards. Where Ctrl-C breaks off
    the waiting itself, `settle` goes on with it.

    More than one lane takes the process's cores for itself: torch computes with one thread from then on.
    """

    def __init__(self, num_lanes: int) -> None:
        self.count = num_lanes
        self._pool = None
        self._others: list[Future[Any]] = []
        if num_lanes > 1:
            torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(num_lanes - 1, thread_name_prefix="lane")
            all_here = Barrier(num_lanes)  # all threads are begun now: later, a part may be taken in and none be begun
            begun = [self._pool.submit(all_here.wait, START_SECONDS) for _ in range(num_lanes - 1)]
            all_here.wait(START_SECONDS)
            wait(begun)

    def run(self, compute: Callable[[Item], Result], parts: Sequence[Item]) -> list[Result]:
        """compute(part) of each, the first in the calling thread. Raises what the first failing part raised."""
        if self._pool is None or len(parts) < 2:
            return [compute(part) for part in parts]
        with interrupts_wait():
            for part in parts[1:]:
                self._others.append(self._pool.submit(compute, part))
            others = list(self._others)
        try:
            first = compute(parts[0])
        finally:
            self.settle()
        return [first, *(other.result() for other in others)]

    def settle(self) -> None:
        """Wait for the parts of a `run` that was left."""
        wait(self._others)
        self._others = []
