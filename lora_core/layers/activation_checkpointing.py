# pyright: basic
"""Activation (gradient) checkpointing: a tick keeps only the inputs of blocks, and its backward recomputes the blocks.

It applies to all blocks of a tick or to none, depending on memory. The second forward costs a quarter to a third more
time. The bits are the same in both cases, because only backwards add to an adapter's gradient, and each runs once.
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
"""Safety factor on the estimated bytes per token before a tick has measured them."""
USABLE = 0.9
"""Usable fraction of free memory, since the allocator leaves gaps."""
MIN_MEASURED_TOKENS = 512
"""Minimum tokens of a tick that measures the bytes per token. In smaller ones the constant part dominates."""
GATED_MLP = {"gate_proj", "up_proj", "down_proj"}
SHARED_INPUTS = {"k_proj", "v_proj", "up_proj"}
"""Linears that read the same input as another, which is kept once."""
RECOMPUTED_INPUTS = {"q_proj", "gate_proj", "down_proj"}
"""Linears of a model with gated MLPs that read a norm or a gated activation. The backward of a GPU's compiled kernels
recomputes these inputs."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that transformers can checkpoint: the repeated blocks of every model family."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a block's `forward`. In a checkpointed pack with gradients enabled, keep only its inputs.

    A backward runs outside the pack, and on a GPU in another thread, so the recomputation restores the block's pack.
    """
    pack, kernels = current_pack(), current_kernels()
    if pack is None or not pack.is_checkpointed or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # dropout and noise are pure functions of their keys
        context_fn=lambda: (nullcontext(), running(pack, kernels)),
        **kwargs,
    )


class ActivationMemory:
    """Decides whether a tick is checkpointed, from the measured bytes per token of ticks that weren't.

    "auto" depends on memory on a GPU, and never checkpoints on a CPU, where no allocator reports free memory. Until a
    tick has measured it, a token is estimated by the inputs and outputs of linears that a tick keeps. An estimate above
    what the device has free for a whole tick would not be corrected, because only ticks without checkpointing measure.

    `num_checkpointed` counts the ticks that were checkpointed.
    """

    def __init__(
        self,
        linears: dict[str, nn.Module],
        *,
        device: str,
        item_bytes: int,
        mode: CheckpointBlocks,
        is_compiled: bool = False,
    ) -> None:
        """`is_compiled`: compiled kernels of a GPU compute all norms and gated MLPs."""
        self.mode = mode
        self.num_checkpointed = 0
        self._device = device
        numbers = _kept_numbers(linears, is_compiled=is_compiled)
        self._guessed_bytes_per_token = self.bytes_per_token = MARGIN * numbers * item_bytes
        self._is_shown = False
        self._others_bytes_per_token, self._lacking_bytes = 0.0, 0  # of other ranks, see `adopt_ranks`
        self._too_many_tokens: int | None = None  # size of a tick that ran out of memory
        self._peak_bytes = 0

    @property
    def _measures(self) -> bool:
        return self.mode == "auto" and self._device.startswith("cuda")

    def checkpoints(self, num_tokens: int, *, is_short: bool = False) -> bool:
        """Return whether a tick of `num_tokens` needs checkpointing.

        `is_short`: an earlier attempt of one of its jobs ran out of memory, so measurements are not trusted.
        """
        if is_short and self.mode == "auto":
            return True
        if not self._measures:
            return self.mode == "always"
        if self._too_many_tokens is not None and num_tokens >= self._too_many_tokens:
            return True
        free_bytes = _free_bytes(self._device) - self._lacking_bytes
        return num_tokens * max(self.bytes_per_token, self._others_bytes_per_token) > USABLE * free_bytes

    def own_memory(self) -> tuple[int, int]:
        """Return this rank's free bytes and bytes per token, for the other ranks."""
        return (_free_bytes(self._device), int(self.bytes_per_token)) if self._measures else (0, 0)

    def adopt_ranks(self, own: tuple[int, int], of_ranks: Sequence[tuple[int, int]]) -> None:
        """Decide for the rank with the least memory from now on. `of_ranks` contains what all ranks measured."""
        self._lacking_bytes = own[0] - min(free_bytes for free_bytes, _ in of_ranks)
        self._others_bytes_per_token = float(max(per_token for _, per_token in of_ranks))

    def force_checkpointing(self, num_tokens: int) -> bool:
        """Enable checkpointing for ticks of at least `num_tokens`, after such a tick ran out of memory without it.

        Returns False if the mode does not allow it. Free memory can't be used here, because the exception still holds
        the activations of the tick.
        """
        if not self._measures:
            return False
        self._too_many_tokens = num_tokens
        return True

    def forget(self) -> None:
        """Discard measurements after a job was evicted.

        They depend on the jobs of a tick: dropout or DoRA in one job takes more bytes per token, and every adapter
        takes memory.
        """
        self.bytes_per_token, self._is_shown, self._too_many_tokens = self._guessed_bytes_per_token, False, None
        self._others_bytes_per_token = 0.0

    def expect(self) -> None:
        """Allow for MARGIN times the measured bytes until the next measurement, after a job was admitted."""
        if self._is_shown:
            self.bytes_per_token, self._is_shown = MARGIN * self.bytes_per_token, False

    @contextmanager
    def observed(self, num_tokens: int, *, kind: Kind, checkpointed: bool) -> Iterator[None]:
        """Measure the bytes per token in the block. A tick that fails changes nothing."""
        if not self._measures or kind != "train" or checkpointed or num_tokens < MIN_MEASURED_TOKENS:
            yield
            self.num_checkpointed += checkpointed
            return
        self._peak_bytes = self.peak_bytes()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        measured = (torch.cuda.max_memory_allocated(self._device) - before) / num_tokens
        self.bytes_per_token = max(self.bytes_per_token, measured) if self._is_shown else measured
        self._is_shown = True

    def restart_peak(self) -> None:
        """Restart the measurement of `peak_bytes`. Has no effect on a CPU, whose process peak can't be reset."""
        self._peak_bytes = 0
        if self._device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """Return the peak memory over all ticks or since `restart_peak`: of a GPU, or of the process on a CPU."""
        if not self._device.startswith("cuda"):
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(self._peak_bytes, torch.cuda.max_memory_allocated(self._device))

    def cached_bytes(self) -> int:
        """Return the bytes that torch has freed and keeps for itself. 0 on a CPU."""
        return _cached_bytes(self._device) if self._device.startswith("cuda") else 0


def _free_bytes(device: str) -> int:
    """Return the bytes that the driver reports as free plus those that torch caches."""
    return torch.cuda.mem_get_info(device)[0] + _cached_bytes(device)


def _cached_bytes(device: str) -> int:
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _kept_numbers(linears: dict[str, nn.Module], *, is_compiled: bool) -> int:
    """Return the numbers that a token keeps for the backward: outputs, and inputs that are not recomputed.

    Single operations keep copies of inputs, so all inputs count for them, also shared ones.
    """
    last_names = {name: name.rpartition(".")[2] for name in linears}
    left_out = SHARED_INPUTS | RECOMPUTED_INPUTS if is_compiled and set(last_names.values()) >= GATED_MLP else set()
    shapes = ((last_names[name], *_weight_shape(linear)) for name, linear in linears.items())
    return sum(out_features + (0 if last in left_out else in_features) for last, out_features, in_features in shapes)


def _weight_shape(linear: nn.Module) -> tuple[int, ...]:
    """Return (out, in) of a linear. A Conv1D's weight has both; a quantized weight has another, packed shape."""
    sizes = getattr(linear, "out_features", None), getattr(linear, "in_features", None)
    return tuple(size for size in sizes if size is not None) or tuple(linear.weight.shape)  # pyright: ignore
