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
DEVICE_FILES = (DRIVER, Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""A machine without any of them has no NVIDIA GPU. The last one is that of Windows Subsystem for Linux."""


def choose(wanted: str | None) -> list[str]:
    """Return `cpu` or GPU numbers. Default: every GPU of the machine, or the CPU if there is none.

    Raises LorryError if the list is invalid, or names a GPU that the machine does not have.
    """
    if wanted is None:
        return _visible(_listed()) or [CPU]
    chosen = [part.strip().lower() for part in wanted.split(",")]
    if chosen == [CPU]:
        return chosen
    wrong = [f"{part!r} is not a GPU number" for part in chosen if not re.fullmatch(r"[0-9]{1,3}", part)]
    chosen = chosen if wrong else [str(int(part)) for part in chosen]
    wrong = wrong or [f"GPU {part} is listed more than once" for part in chosen if chosen.count(part) > 1]
    if wrong:
        raise LorryError("bad_devices", wanted=wanted, wrong=wrong[0])
    _require(chosen)
    return chosen


def _require(chosen: list[str]) -> None:
    """Raise LorryError if the machine lacks one of these GPUs, or CUDA_VISIBLE_DEVICES hides it.

    The worker decides if nvidia-smi lists no GPU although there are signs of one.
    """
    try:
        listed = _visible(_listed())
    except LorryError:
        return
    if not listed and any(map(Path.exists, DEVICE_FILES)):
        return
    missing = [gpu for gpu in chosen if gpu not in listed]
    if missing:
        raise LorryError(
            "gpu_missing" if listed else "gpu_missing_on_cpu_machine",
            missing=", ".join(missing),
            listed=", ".join(listed) or "none",
        )


def _visible(gpus: list[str]) -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES allows."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if visible is None else [gpu for gpu in gpus if gpu in visible.replace(" ", "").split(",")]


def _listed() -> list[str]:
    """Return the GPU numbers that nvidia-smi lists.

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
        raise LorryError("gpus_not_found", reason=str(reason).strip()) from error
    return [line.strip() for line in listed if line.strip().isdigit()]
