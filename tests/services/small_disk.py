"""A real file system of a few kilobytes, to be filled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.services.programs import Missing


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Mount a small file system at `folder` during the block. Skips the test without permission to mount."""
    with ExitStack() as stack:
        try:
            stack.enter_context(mounted(folder, num_bytes))
        except Missing as missing:
            pytest.skip(str(missing))
        yield folder


@contextmanager
def mounted(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Mount it in the same way. Raises Missing without permission to mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        raise Missing("mounting a small file system needs root")
    try:
        yield folder
    finally:
        # Lazily, because a process that was just killed may still have a file open.
        subprocess.run(["umount", "--lazy", folder], check=True)
