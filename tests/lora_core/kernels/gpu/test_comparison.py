"""Kernels that differ from their reference, fail or do not fit the device are not used, and the reason is reported.

Triton is replaced here. tests/lora_core/kernels/gpu/interpreted/test_comparison.py compares the kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn, get_args

import pytest
import torch
from torch import Tensor

from lora_core.kernels.gpu import comparison
from lora_core.kernels.gpu.comparison import INSTEAD, Family, agree, reason_against

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
FAMILIES: tuple[Family, ...] = get_args(Family)


@pytest.fixture(autouse=True)
def uncompared(monkeypatch: pytest.MonkeyPatch) -> None:
    """No family was compared before, and the GPU is one of compute capability 9.0."""
    monkeypatch.setattr(comparison, "compare", comparison.compare.__wrapped__)
    monkeypatch.setattr(comparison, "_refused", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


def reason_of(family: Family, device: torch.device) -> str | None:
    return reason_against(family, device, torch.bfloat16, size=64 if family in ("attention", "decoding") else 0)


def computing(difference: float) -> Callable[..., list[tuple[str, Tensor, Tensor]]]:
    """Return a stand-in of `results`, one of which differs."""
    expected = torch.tensor([1.0, -4.0])
    return lambda *_: [("y", expected, expected), ("dx", expected + torch.tensor([difference, 0.0]), expected)]


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_used_if_all_results_are_within_the_tolerance(
    monkeypatch: pytest.MonkeyPatch, family: Family
) -> None:
    monkeypatch.setattr(comparison, "results", computing(0.07))
    close = reason_of(family, CUDA)
    monkeypatch.setattr(comparison, "results", computing(0.2))
    far = reason_of(family, CUDA)

    assert close is None
    assert far == f"{INSTEAD[family]}: dx of the Triton kernels differs by 5.0e-02 of its largest number"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_result_that_is_not_finite_differs(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(comparison, "results", computing(value))

    assert reason_of("lora", CUDA) is not None


@pytest.mark.parametrize(
    ("family", "dtype", "size", "capability", "reason"),
    [
        ("lora", torch.float32, 0, (9, 0), "do not take torch.float32"),
        ("lora", torch.bfloat16, 0, (7, 5), "need compute capability 8.0, not 7.5"),
        ("attention", torch.float32, 256, (9, 0), "do not take heads of 256 features in torch.float32"),
        ("attention", torch.bfloat16, 512, (9, 0), "do not take heads of 512 features in torch.bfloat16"),
        ("attention", torch.float16, 64, (9, 0), "do not take heads of 64 features in torch.float16"),
        ("attention", torch.bfloat16, 64, (7, 5), "need compute capability 8.0, not 7.5"),
        ("decoding", torch.bfloat16, 512, (9, 0), "do not take heads of 512 features in torch.bfloat16"),
        ("decoding", torch.bfloat16, 64, (7, 5), "need compute capability 8.0, not 7.5"),
    ],
)
def test_reason_names_what_the_kernels_do_not_take(
    monkeypatch: pytest.MonkeyPatch,
    family: Family,
    dtype: torch.dtype,
    size: int,
    capability: tuple[int, int],
    reason: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(comparison, "results", lambda *_: pytest.fail("it was compared"))

    assert reason_against(family, CUDA, dtype, size=size) == f"{INSTEAD[family]}: the Triton kernels {reason}"


@pytest.mark.parametrize("family", FAMILIES)
def test_machine_without_triton_reports_that(monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for module in ("attention", "decoding", "segmented_lora", "elementwise", "optimizer", "random_numbers"):
        monkeypatch.delitem(sys.modules, f"lora_core.kernels.gpu.{module}", raising=False)

    reason = reason_of(family, CPU)

    assert reason is not None
    assert reason.startswith(f"{INSTEAD[family]}: Triton is not installed")


class CompilationError(Exception):
    """Like Triton's, which has no base class but Exception."""


def raising(error: Exception) -> Callable[..., NoReturn]:
    def raises(*_: object) -> NoReturn:
        raise error

    return raises


def test_kernel_that_does_not_compile_is_reported_by_the_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "results", raising(CompilationError("at 1:2\nmore")))

    assert reason_of("lora", CUDA) == f"{INSTEAD['lora']}: a Triton kernel failed (at 1:2)"


def test_fault_of_the_device_is_raised_unless_the_device_is_still_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    faulted = raising(torch.AcceleratorError("CUDA error: misaligned address"))
    monkeypatch.setattr(comparison, "results", faulted)

    assert reason_of("lora", CUDA) == f"{INSTEAD['lora']}: a Triton kernel failed (CUDA error: misaligned address)"

    monkeypatch.setattr(torch.cuda, "synchronize", faulted)
    with pytest.raises(torch.AcceleratorError, match="misaligned address"):
        reason_of("lora", CUDA)


def test_shortage_of_memory_says_nothing_about_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "results", raising(RuntimeError("Triton Error [CUDA]: out of memory")))

    with pytest.raises(RuntimeError, match="out of memory"):
        reason_of("lora", CUDA)


def test_elementwise_kernels_are_compared_in_both_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[torch.dtype] = []
    monkeypatch.setattr(comparison, "results", lambda _family, _device, dtype, *_: compared.append(dtype) or [])

    assert reason_against("elementwise", CUDA) is None
    assert compared == [torch.bfloat16, torch.float32]


def test_elementwise_kernels_that_another_rank_cannot_use_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise ranks would take other steps, and one would complete an initialization before the others."""
    monkeypatch.setattr(comparison, "results", lambda *_: [])

    agree(CUDA, lambda own: [own, None])
    assert reason_against("elementwise", CUDA) is None
    agree(CUDA, lambda own: [own, "no C compiler", None])
    assert reason_against("elementwise", CUDA) == "no C compiler, on another rank"
    assert reason_of("lora", CUDA) is None
