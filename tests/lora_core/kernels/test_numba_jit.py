"""Compiled kernels: one piece of code each, cached between processes, and a clear error without Numba."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba.core import caching, config
from numba.core.caching import NullCache

from lora_core.kernels import attention, elementwise, numba_jit
from lora_core.kernels.numba_jit import compiled

STORED = {"float32": np.float32, "bfloat16": np.uint16}
FLOATS = np.ones(32, np.float32)


def kernels() -> dict[str, Any]:
    modules = (attention, elementwise, elementwise, elementwise, elementwise)
    return {name: member for module in modules for name, member in vars(module).items() if hasattr(member, "py_func")}


def arguments(stored: type) -> dict[str, tuple[Any, ...]]:
    """Return arguments with the types that each kernel is called with."""
    row, rows, place, none = np.ones(32, stored), np.ones((2, 16), stored), (0, 0, 2), np.ones(0, np.float32)
    return {
        "visible_softmax": (row, row, 2, 16, 1, place, 0.5, 0.0, True, 2),
        "score_gradient": (row, row, row, 2, 16, 1, place, 0.5, 0.0, True, 2),
        "to_heads": (row, 0, 16, 16, 2, 2, 1, 16, row),
        "from_heads": (row, 2, 1, 16, row),
        "swiglu": (row, row, row),
        "swiglu_backward": (row, row, row, row, row),
        "score_logits": (rows, np.zeros(2, np.int64), none, FLOATS, np.zeros(2, np.bool_), FLOATS, FLOATS),
        "logit_gradient": (rows, np.zeros(2, np.int64), FLOATS, none, FLOATS, FLOATS),
        "rms_norm": (rows, row, 1e-6, rows, FLOATS),
        "add_rms_norm": (rows, rows, row, 1e-6, rows, rows, FLOATS),
        "rms_norm_backward": (rows, FLOATS, row, rows, rows, rows),
        "rotate": (row, 16, 16, row, row, 2, 1, 16, False, row),
    }


def functions_apart(kernel: Any, given: tuple[Any, ...]) -> list[str]:
    """Return the functions that a kernel compiles to, apart from itself and its entry points from Python.

    The linker may replace such a function by that of another kernel.
    """
    fresh: Any = compiled(kernel.py_func)
    fresh._cache = NullCache()
    signature = tuple(numba.typeof(argument) for argument in given)
    fresh.compile(signature)
    defined = re.findall(r"^define linkonce_odr .*?@\"?([\w.$]+)", fresh.inspect_llvm(signature), re.MULTILINE)
    return [name for name in defined if not name.startswith("NRT_")]


@numba.njit
def total(row):
    found = 0.0
    for number in row:
        found += np.exp(number)
    return found


def calls_another(row, rows):
    for place in range(rows.shape[0]):
        row[place] = total(rows[place]) + total(rows[place, ::2])


def test_kernel_that_calls_another_function_is_detected():
    assert functions_apart(compiled(calls_another), (FLOATS, np.ones((2, 16), np.float32))) != []


def test_every_kernel_has_arguments_here():
    assert kernels().keys() == arguments(np.float32).keys()


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("name", kernels())
def test_kernel_is_one_function_without_helper_functions(name, dtype):
    """Regression test: the bytes of an adapter depended on whether its process had compiled the kernels."""
    assert functions_apart(kernels()[name], arguments(STORED[dtype])[name]) == []


@pytest.fixture
def kept_in(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def doubled(numbers):
    for index in range(numbers.size):
        numbers[index] *= 2


def cached() -> dict[str, int]:
    """Return how often a new process finds the kernel in the cache, and how often it compiles the kernel."""
    kernel: Any = compiled(doubled)
    numbers = np.ones(3, np.float32)
    kernel(numbers)
    assert numbers.tolist() == [2, 2, 2]
    return {"found": sum(kernel.stats.cache_hits.values()), "compiled": sum(kernel.stats.cache_misses.values())}


def test_a_kernel_is_compiled_once_for_all_processes(kept_in):
    assert [cached(), cached()] == [{"found": 0, "compiled": 1}, {"found": 1, "compiled": 0}]


def test_kernel_is_recompiled_after_a_change_of_shared_code(kept_in, monkeypatch):
    cached()

    monkeypatch.setattr(numba_jit, "shared_digest", lambda: "of other sources")

    assert cached() == {"found": 0, "compiled": 1}


def test_shared_digest_covers_every_kernel_file(tmp_path, monkeypatch):
    names = ("kernels/numba_jit.py", "kernels/elementwise.py", "engine.py")
    (tmp_path / "kernels").mkdir()
    for name in names:
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(numba_jit, "__file__", str(tmp_path / "kernels" / "numba_jit.py"))
    digest_now = numba_jit.shared_digest.__wrapped__
    before, changed = digest_now(), {}

    for name in names:
        (tmp_path / name).write_text("after")
        changed[name] = digest_now() != before
        (tmp_path / name).write_text("before")

    assert changed == {"kernels/numba_jit.py": True, "kernels/elementwise.py": True, "engine.py": False}


@pytest.mark.parametrize("moment", ["load", "save"])
def test_failing_disk_costs_only_a_compilation(kept_in, monkeypatch, moment):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, moment, fail)

    assert [cached(), cached()] == [{"found": 0, "compiled": 1}] * 2


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
