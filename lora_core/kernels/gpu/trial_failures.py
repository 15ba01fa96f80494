# pyright: basic
"""Exceptions in a trial of kernels: a reason to compute without them, unless the device itself failed."""

import torch

from lora_core.runtime.device_errors import is_shortage


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
