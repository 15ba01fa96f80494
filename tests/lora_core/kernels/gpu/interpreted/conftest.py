# pyright: standard, reportMissingImports=false
"""These tests run in Triton's interpreter. tests/lora_core/kernels/gpu/test_triton_kernels.py starts them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def checked_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check each `tl.multiple_of`. The interpreter ignores it, and a GPU faults if it is false."""
    from triton.runtime.interpreter import TensorHandle

    def set_attr(self: Any, key: str, values: list[int]) -> None:
        found, (divisor,) = np.asarray(self.data), values
        assert key == "tt.divisibility", f"{key} is not checked"
        assert found.size == 1, "only scalars are checked"
        assert int(found.item()) % divisor == 0, f"{found.item()} is no multiple of {divisor}"

    monkeypatch.setattr(TensorHandle, "set_attr", set_attr)
