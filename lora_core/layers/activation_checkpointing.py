# pyright: basic
"""Gradient checkpointing: a tick may keep only what enters each block, and compute the block again in its backward.

All blocks of a tick or none, decided by memory: a second forward costs a quarter to a third more time. Both ways give
the same bits, for an adapter's gradient is added to by backwards alone, and those run once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_core.config import Kind
from lora_core.packing.packed_batch import current_kernels, current_pack, running

CheckpointBlocks = Literal["auto", "always", "never"]
MARGIN = 1.25
"""On what a token is thought to take before a tick has shown it."""
USABLE = 0.9
"""Of the memory that is free: the allocator leaves gaps."""
TELLING_TOKENS = 512
"""Of a tick from which on it tells what a token takes; below, what doesn't grow with tokens weighs too much."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What transformers' own checkpointing computes again: the repeated blocks of every family."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block's `forward`; in a checkpointed pack under autograd, one that keeps nothing but its inputs.

    A backward has no running pack, and on a GPU a thread of its own: so it is told which one the block belongs to.
    """
    pack, kernels = current_pack(), current_kernels()
    if pack is None or not pack.is_checkpointed or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # dropout and noise are functions of their keys
        context_fn=lambda: (nullcontext(), running(pack, kernels)),
        **kwargs,
    )


class ActivationMemory:
    """Decides whether a tick is checkpointed, from the bytes that a token took in ticks that weren't.

    `auto` is by memory on a GPU, and never on a CPU, where no allocator says what is free. Until a tick has shown it,
    a token is thought to take what enters and leaves every linear.
    """

    def __init__(self, linears: dict[str, nn.Module], *, device: str, item_bytes: int, mode: CheckpointBlocks) -> None:
        self.mode = mode
        self._device = device
        numbers = sum(size for linear in linears.values() for size in _weight_shape(linear))
        self._guessed_bytes_per_token = self.bytes_per_token = MARGIN * numbers * item_bytes
        self._is_shown = False
        self._others_bytes_per_token, self._lacking_bytes = 0.0, 0  # of other ranks: see heed
        self._too_many_tokens: int | None = None  # once ran out of memory
        self._peak_bytes = 0

    @property
    def _measures(self) -> bool:
        return self.mode == "auto" and self._device.startswith("cuda")

    def checkpoints(self, num_tokens: int, *, is_short: bool = False) -> bool:
        """Whether a tick of so many tokens has to compute its blocks again. is_short: memory has run out for one of its
        jobs before, so that nothing measured here is trusted."""
        if is_short and self.mode == "auto":
            return True
        if not self._measures:
            return self.mode == "always"
        if self._too_many_tokens is not None and num_tokens >= self._too_many_tokens:
            return True
        free_bytes = _free_bytes(self._device) - self._lacking_bytes
        return num_tokens * max(self.bytes_per_token, self._others_bytes_per_token) > USABLE * free_bytes

    def own_memory(self) -> tuple[int, int]:
        """Of this rank, for the others: bytes that are free, and those that a token takes."""
        return (_free_bytes(self._device), int(self.bytes_per_token)) if self._measures else (0, 0)

    def heed(self, own: tuple[int, int], of_ranks: Sequence[tuple[int, int]]) -> None:
        """Decide from now on for the rank that has the least, by what all have told at one time."""
        self._lacking_bytes = own[0] - min(free_bytes for free_bytes, _ in of_ranks)
        self._others_bytes_per_token = float(max(per_token for _, per_token in of_ranks))

    def gives_way(self, num_tokens: int) -> bool:
        """After memory ran out in a tick that wasn't checkpointed: whether one of so many tokens is from now on.

        What is free says nothing here, for the error still holds the activations of the tick.
        """
        if not self._measures:
            return False
        self._too_many_tokens = num_tokens
        return True

    def forget(self) -> None:
        """What ticks showed was of those who were in them: a job with dropout or DoRA makes every token dearer, and
        anyone's row the room smaller."""
        self.bytes_per_token, self._is_shown, self._too_many_tokens = self._guessed_bytes_per_token, False, None
        self._others_bytes_per_token = 0.0

    @contextmanager
    def observed(self, num_tokens: int, *, kind: Kind, checkpointed: bool) -> Iterator[None]:
        """Learn from a tick what a token takes; from one that failed, nothing."""
        if not self._measures or kind != "train" or checkpointed or num_tokens < TELLING_TOKENS:
            yield
            return
        self._peak_bytes = self.peak_bytes()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        taken = (torch.cuda.max_memory_allocated(self._device) - before) / num_tokens
        self.bytes_per_token = max(self.bytes_per_token, taken) if self._is_shown else taken
        self._is_shown = True

    def restart_peak(self) -> None:
        """What was in use before no longer counts in `peak_bytes`; a process on a CPU can't forget it."""
        self._peak_bytes = 0
        if self._device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """The most that was in use over all ticks, or since `restart_peak`: of a GPU, or of the process on a CPU."""
        if not self._device.startswith("cuda"):
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(self._peak_bytes, torch.cuda.max_memory_allocated(self._device))


def _free_bytes(device: str) -> int:
    """What the driver has left, and what torch keeps for later."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _weight_shape(linear: nn.Module) -> tuple[int, ...]:
    """(out, in) of a plain linear, or as a Conv1D has them; what a quantized one holds packed tells otherwise."""
    sizes = getattr(linear, "out_features", None), getattr(linear, "in_features", None)
    return tuple(size for size in sizes if size is not None) or tuple(linear.weight.shape)  # pyright: ignore
