"""A GPU draws dropout masks itself if its kernel passes the trial. Otherwise the reason is reported, or a fault raised.

Triton is replaced here. tests/lora_core/kernels/gpu/interpreted/test_dropout.py tests the kernel.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from lora_core.kernels.gpu import dropout_trial
from lora_core.kernels.gpu.dropout_trial import why_not_drawn
from lora_core.packing import packed_batch
from lora_core.packing.packed_batch import DropoutKey

MODULE = "lora_core.kernels.gpu.dropout"
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
KEY = DropoutKey(probability=0.25, seed=1, step=2, slice_index=3)


class CompilationError(Exception):
    """Like Triton's, which has no base class but Exception."""


def fails(*_: object) -> NoReturn:
    raise CompilationError("at 1:2\nmore")


def with_kernel(monkeypatch: pytest.MonkeyPatch, draw_mask: Any) -> None:
    module = ModuleType(MODULE)
    vars(module)["draw_mask"] = draw_mask
    monkeypatch.setitem(sys.modules, MODULE, module)


def test_machine_without_triton_reports_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)

    reason = why_not_drawn.__wrapped__(CPU)

    assert reason is not None
    assert "the host draws the dropout masks" in reason
    assert "Triton is not installed" in reason


def test_kernel_that_does_not_compile_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernel(monkeypatch, fails)

    reason = why_not_drawn.__wrapped__(CPU)

    assert reason is not None
    assert reason.endswith("a Triton kernel failed (at 1:2)")


def test_fault_of_the_device_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(device: torch.device) -> NoReturn:
        raise torch.AcceleratorError(f"misaligned address on {device}", 716)

    with_kernel(monkeypatch, fails)
    monkeypatch.setattr("lora_core.kernels.gpu.dropout_trial.upload", lambda arrays, _device: [torch.empty(3)])
    monkeypatch.setattr(torch.cuda, "synchronize", faulty)

    with pytest.raises(torch.AcceleratorError, match="misaligned address on cuda:0"):
        why_not_drawn.__wrapped__(CUDA)


class OnCuda:
    """A tensor of a GPU, as far as `keep_TD` reads it."""

    device, shape = CUDA, (3, 8)

    def numel(self) -> int:
        return 24


@pytest.mark.parametrize("reason", [None, "no C compiler"])
def test_gpu_draws_the_mask_unless_there_is_a_reason_against_it(
    monkeypatch: pytest.MonkeyPatch, reason: str | None
) -> None:
    drawn: list[tuple[list[int], int, Any]] = []

    def draw_mask(key: Any, threshold: int, like: Any) -> Tensor:
        drawn.append((key.tolist(), threshold, like))
        return torch.zeros(3, 8)

    with_kernel(monkeypatch, draw_mask)
    monkeypatch.setattr(dropout_trial, "why_not_drawn", lambda device: reason if device == CUDA else "another device")
    monkeypatch.setattr(packed_batch, "upload", lambda arrays, _device: [torch.from_numpy(array) for array in arrays])
    like: Any = OnCuda()

    mask = KEY.keep_TD("q_proj", like)

    if reason is None:
        assert drawn == [(KEY.key_words(["q_proj"])[0].tolist(), 49152, like)]
    else:
        assert drawn == []
        assert torch.equal(mask, KEY.keep_TD("q_proj", torch.empty(3, 8)))


def test_shortage_of_memory_says_nothing_about_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_out(*_: object) -> NoReturn:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    with_kernel(monkeypatch, runs_out)

    with pytest.raises(RuntimeError, match="out of memory"):
        why_not_drawn.__wrapped__(CPU)
