"""Triton for tests, installed once from PyPI into a folder of its own in the cache of the tests (1 GB).

It is no dependency of the project, because torch's CUDA builds contain it. Tests use it in child processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.services.programs import CACHE, INSTALL_SECONDS, Missing, find_or_install

VERSION = "3.7.1"
"""That of the worker image: other versions need other registers and lose other hints."""
FOLDER = CACHE / f"triton-{VERSION}"


def triton_folder() -> Path:
    """Return the folder that contains Triton's packages. Raises Missing if it can't be installed."""
    return find_or_install(_found, name="Triton", installs=[_install])


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a child process that can import Triton. Compiled kernels are kept in the cache."""
    folder = triton_folder()
    return os.environ | {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(CACHE / "triton-kernels")} | variables


def _found() -> Path | None:
    return FOLDER if (FOLDER / "complete").exists() else None


def _install() -> None:
    options = ["--quiet", "--no-deps", "--upgrade", "--target", str(FOLDER)]
    command = [sys.executable, "-m", "pip", "install", *options, f"triton=={VERSION}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        output = str(getattr(error, "stderr", "") or error).strip()
        raise Missing(f"{' '.join(command[:4])} failed: {output[-300:]}") from error
    (FOLDER / "complete").touch()
