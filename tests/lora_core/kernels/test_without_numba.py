"""Without Numba, a GPU still trains, and a CPU gets a clear error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
REASON = "Numba needs NumPy 2.4 or less. Got NumPy 2.5"
LOADS = """
import sys

import torch

from lora_core.base_model.model import load_base
from lora_core.engine.engine import Engine
from lora_core.errors import LoraCoreError

torch.cuda.is_available = lambda: True
try:
    load_base("missing", dtype="bfloat16", device=sys.argv[1])
except LoraCoreError as error:
    print(error.code, error)
"""


@pytest.fixture
def refusing(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a process whose Numba does not accept its NumPy."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text(f"raise ImportError({REASON + '.'!r})\n")
    return os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize(
    ("device", "code", "error", "warning"),
    [
        ("cpu", "invalid_config", f"on a CPU, because Numba can't be imported (ImportError: {REASON}). Install", ""),
        ("cuda:0", "source_unreachable", "The folder 'missing' does not exist.", f"(ImportError: {REASON}). The GPU"),
    ],
)
def test_a_numba_that_refuses_its_numpy_stops_a_cpu_and_not_a_gpu(
    refusing: dict[str, str], tmp_path: Path, device: str, code: str, error: str, warning: str
) -> None:
    command = [sys.executable, "-c", LOADS, device]

    ended = subprocess.run(command, cwd=tmp_path, env=refusing, capture_output=True, text=True, check=False)

    assert ended.stdout.startswith(code), ended.stderr
    assert error in ended.stdout
    assert warning in ended.stderr
    assert ("Numba" in ended.stderr) == bool(warning)
