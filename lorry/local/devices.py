"""Selection of the devices to train on. Each gets one worker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from lorry.errors import LorryError

CPU = "cpu"
DRIVER = Path("/proc/driver/nvidia/version")
"""Exists while the kernel has the driver of NVIDIA GPUs loaded."""


def choose(wanted: str | None) -> list[str]:
    """Return `cpu` or GPU numbers. Default: every GPU of the machine, or the CPU if there is none."""
    if wanted is None:
        return _gpus() or [CPU]
    chosen = [part.strip().lower() for part in wanted.split(",")]
    if chosen == [CPU]:
        return chosen
    wrong = [f"{part!r} is not a GPU number" for part in chosen if not re.fullmatch(r"\d{1,3}", part)]
    wrong = wrong or [f"GPU {part} is listed more than once" for part in chosen if chosen.count(part) > 1]
    if wrong:
        raise LorryError(
            f"--devices is {wanted!r}, but must be 'cpu' or a list of different GPU numbers: {wrong[0]}.",
            code="bad_devices",
            remedy="Use `--devices cpu`, or for example `--devices 0,1`.",
        )
    return chosen


def _gpus() -> list[str]:
    """Return the GPU numbers that nvidia-smi lists, restricted to CUDA_VISIBLE_DEVICES.

    Raises LorryError if nvidia-smi fails although the driver is loaded.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    argv = [tool, "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        if not DRIVER.exists():
            return []
        reason = error.stdout if isinstance(error, subprocess.CalledProcessError) else error
        raise LorryError(
            f"nvidia-smi does not list the GPUs of this machine: {str(reason).strip()}",
            code="gpus_not_found",
            remedy="Repair the driver, name the GPUs with --devices, or train on the CPU with `--devices cpu`.",
        ) from error
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [line.strip() for line in listed if line.strip().isdigit()]
    return found if visible is None else [gpu for gpu in found if gpu in visible.split(",")]
