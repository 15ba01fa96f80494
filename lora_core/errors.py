# pyright: strict
"""Errors a user can act on: each has a code, a sentence and a remedy. No torch here.

Our own mistakes are asserts, never one of these.
"""

from typing import Literal

ANY_FAILURE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What the code of a family may raise that was not written for where we ask it."""


class LoraCoreError(ValueError):
    """Root of the errors meant for a person; `code` is snake_case, `message` a sentence, `remedy` says what to do."""

    code = "lora_core_error"
    ranks: tuple[int, ...] = ()
    """Of several processes those that raised it, which `Ranks.together` tells."""

    def __init__(self, message: str, *, remedy: str, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.code = code or type(self).code

    def __str__(self) -> str:
        """What a traceback shows."""
        return f"{self.message} {self.remedy}"


class ConfigError(LoraCoreError):
    """A number or name in a job's or the engine's configuration is out of range."""

    code = "invalid_config"


class UnsupportedModel(LoraCoreError):
    """The base model can't be trained here, or its files can't be trusted."""

    code = "unsupported_model"


class UnreachableSource(LoraCoreError):
    """A base model's source doesn't exist, or can't be read from here."""

    code = "source_unreachable"


class NoTargets(LoraCoreError):
    """`target_modules` matches no linear layer of the base model."""

    code = "no_targets"


class BadDataset(LoraCoreError):
    """A token file isn't what TokenDataset describes, or doesn't fit the base model."""

    code = "bad_dataset"


class BadCheckpoint(LoraCoreError):
    """A checkpoint is damaged or belongs to another job configuration."""

    code = "bad_checkpoint"


class BadAdapter(LoraCoreError):
    """An exported adapter is damaged, incomplete or of another base model."""

    code = "bad_adapter"


class BadParent(LoraCoreError):
    """The folder of the adapter that a job is to continue can't be used."""

    code = "bad_parent"


class UnsafeFile(LoraCoreError):
    """A tensor file exceeds the limits under which it may be opened."""

    code = "unsafe_file"


Part = Literal["adapter", "start", "data"]


class OutOfMemory(LoraCoreError):
    """A part of `job` doesn't fit: its data, what its start is computed from, one slice of `num_tokens`, or (0) its
    weights and moments."""

    code = "out_of_memory"

    def __init__(self, job: str, *, part: Part = "adapter", num_tokens: int = 0) -> None:
        if part == "data":
            sentence = f"The data of job {job!r} doesn't fit the worker's memory beside what is there."
            remedy = "Give smaller files, lower max_length, or use a machine with more memory."
        elif part == "start":
            sentence = f"What the start of job {job!r} is computed with doesn't fit the device beside what is there."
            remedy = "Begin with init_lora_weights 'pissa_niter_4' or the default, or use a larger device."
        elif num_tokens:
            sentence = f"One slice of {num_tokens} tokens of job {job!r} doesn't fit the device beside what is there."
            remedy = "Lower max_length, or use a larger device."
        else:
            sentence = f"The adapter of job {job!r} doesn't fit the device beside what is there."
            remedy = "Lower the rank, or target fewer modules, or use a larger device."
        super().__init__(sentence, remedy=remedy)
        self.job = job


class BrokenPass(RuntimeError):
    """Memory ran out on a process amid a pass through a divided base. The others wait in it for this one's share of the
    next block, so that nothing can be told them there, and the trainer has to end. No one job's fault."""

    def __init__(self) -> None:
        super().__init__("Memory ran out amid a pass through a divided base, in which the other processes wait.")


class RanksDiffer(RuntimeError):
    """Processes that do all the same have come to different weights, or to different ends of a step. No job's fault: a
    device or a machine computes, or remembers, wrongly. All jobs of the trainer are told of it, so it names none."""

    def __init__(self, ranks: list[int]) -> None:
        others = ", ".join(map(str, ranks))
        super().__init__(
            f"The processes that train one job have come to different weights of it: those of {others} are not those "
            "of 0. A device or its memory is faulty, or the network changes bits. Nothing is kept of them."
        )
