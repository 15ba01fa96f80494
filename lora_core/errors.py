# pyright: strict
"""Errors that a user can fix: each has a code, a message and a remedy. Does not import torch.

Bugs in Lorry raise AssertionError, never one of these.
"""

from typing import Literal

ANY_FAILURE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Exceptions that a model family's own code may raise when the engine calls it in an unexpected way."""


class LoraCoreError(ValueError):
    """Base class of user-facing errors: a snake_case `code`, a one-sentence `message` and a `remedy`."""

    code = "lora_core_error"
    ranks: tuple[int, ...] = ()
    """Ranks on which the error was raised. `Ranks.sharing_errors` sets it."""

    def __init__(self, message: str, *, remedy: str, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.code = code or type(self).code

    def __str__(self) -> str:
        """Return message and remedy, as a traceback shows them."""
        return f"{self.message} {self.remedy}"


class ConfigError(LoraCoreError):
    """A value in a job's or the engine's configuration is out of range."""

    code = "invalid_config"


class DeviceUnusable(LoraCoreError):
    """PyTorch can't use the device on this machine."""

    code = "device_unusable"


class UnsupportedModel(LoraCoreError):
    """The base model is not supported, or its files fail validation."""

    code = "unsupported_model"


class UnreachableSource(LoraCoreError):
    """The source of a base model doesn't exist or can't be read from this machine."""

    code = "source_unreachable"


class NoTargets(LoraCoreError):
    """`target_modules` matches no linear layer of the base model."""

    code = "unknown_target_modules"


class BadDataset(LoraCoreError):
    """A token file violates the format of TokenDataset, or doesn't fit the base model."""

    code = "bad_dataset"


class BadCheckpoint(LoraCoreError):
    """A checkpoint is damaged or belongs to another job configuration."""

    code = "bad_checkpoint"


class BadAdapter(LoraCoreError):
    """An exported adapter is damaged, incomplete or belongs to another base model."""

    code = "bad_adapter"


class BadParent(LoraCoreError):
    """The folder of the parent adapter, from which a job continues, can't be used."""

    code = "bad_parent"


class UnsafeFile(LoraCoreError):
    """A tensor file exceeds the limits under which it may be opened."""

    code = "unsafe_file"


Part = Literal["adapter", "start", "data", "snapshot"]


class OutOfMemory(LoraCoreError):
    """Part of `job` does not fit in memory.

    `part` is "data" (the token files), "start" (the initialization, such as a decomposition), "snapshot" (the copy on
    the host from which a checkpoint is written) or "adapter". With "adapter", `num_tokens` is the size of a single
    slice (micro-batch) that does not fit. 0 stands for the adapter's weights and optimizer state.
    """

    code = "out_of_memory"

    def __init__(self, job: str, *, part: Part = "adapter", num_tokens: int = 0) -> None:
        if part == "data":
            sentence = f"Job {job!r} is out of memory: its training data does not fit in the worker's free memory."
            remedy = "Use smaller files, lower max_length, or use a worker with more memory."
        elif part == "start":
            sentence = f"Job {job!r} is out of memory: its initialization does not fit on the device."
            remedy = "Lower the rank, or use a larger device. With PiSSA or OLoRA, use 'pissa_niter_4' or 'default'."
        elif part == "snapshot":
            sentence = f"Job {job!r} is out of memory: the copy for its checkpoint does not fit in the worker's memory."
            remedy = "Lower the rank, target fewer modules, or use a worker with more memory."
        elif num_tokens:
            sentence = f"Job {job!r} is out of memory: one slice of {num_tokens} tokens does not fit on the device."
            remedy = "Lower max_length, or use a larger device."
        else:
            sentence = f"Job {job!r} is out of memory: its adapter does not fit on the device."
            remedy = "Lower the rank, target fewer modules, or use a larger device."
        super().__init__(sentence, remedy=remedy)
        self.job = job
        self.num_tokens = num_tokens


class BrokenPass(RuntimeError):
    """A rank ran out of memory during a pass through a sharded base model.

    The other ranks block in an all-gather that needs this rank's shard of the next block. They can't be notified
    during the pass, so the trainer must exit.
    """

    def __init__(self) -> None:
        super().__init__("Out of memory during a pass through a sharded base model, in which the other ranks wait.")


class RanksDiffer(RuntimeError):
    """Ranks that replicate the same computation hold different weights, or disagree on the result of a step.

    A device or machine computes or stores values incorrectly, so the failure is not attributed to a job. The error
    is reported to all jobs of the trainer and names none of them.
    """

    def __init__(self, ranks: list[int]) -> None:
        others = ", ".join(map(str, ranks))
        super().__init__(
            f"Ranks hold different weights of the same job: rank 0 differs from {others}. "
            "A device, its memory or the network is faulty. The differing weights are discarded."
        )
