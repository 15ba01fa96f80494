# pyright: basic
"""Failures in a trial of kernels: a reason to compute without them, on all ranks, unless the device itself failed."""

from collections.abc import Callable

import torch

from lora_core.runtime.device_errors import is_shortage


def reason_of_others(own: str | None, gathered: Callable[[str | None], list[str | None]]) -> str | None:
    """Return why another rank can't use kernels that this one can use: `own` is None. `gathered` returns the value of
    every rank. None if all ranks can use them, or this one can't."""
    reason = next(filter(None, gathered(own)), None)
    return f"{reason}, on another rank" if own is None and reason is not None else None


def failure_of(error: Exception, device: torch.device) -> str:
    """Return why kernels can't be used whose trial on `device` has raised `error`.

    Raises torch.AcceleratorError if the trial made the device unusable for this process, for example by an access to
    unmapped memory: every later call would fail, whatever computes it. Raises `error` itself if memory ran out, which
    proves nothing about the kernels.
    """
    if is_shortage(error):
        raise error
    if isinstance(error, ImportError):
        return f"Triton is not installed ({error})"
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as fault:
            fault.add_note(f"A trial of Triton kernels failed. This process can't use {device} any more.")
            raise
    return f"a Triton kernel failed ({str(error).strip().partition(chr(10))[0]})"
