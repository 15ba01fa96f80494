"""Compiled kernels are cached between processes and recompiled after code changes. A full disk is no failure."""

import errno
from typing import Any

import numpy as np
import pytest
from numba.core import caching, config

from lora_core.kernels import numba_jit
from lora_core.kernels.numba_jit import compiled


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
