"""The trial accepts kernels that agree with the reference, and names what differs otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_core.kernels.gpu import segmented_lora
from lora_core.kernels.gpu.trials import why_lora_differs

CPU = torch.device("cpu")


def test_agreeing_kernels_are_accepted() -> None:
    assert why_lora_differs(CPU, torch.float32) is None


@pytest.mark.parametrize(
    ("kernel", "by_b", "result"), [("expand", True, "y"), ("expand", False, "dx"), ("accumulate", True, "dB")]
)
def test_disagreeing_kernel_is_rejected_by_the_name_of_its_result(
    monkeypatch: pytest.MonkeyPatch, kernel: str, by_b: bool, result: str
) -> None:
    original = getattr(segmented_lora, kernel)
    monkeypatch.setattr(
        segmented_lora, kernel, lambda *args, **options: None if options["by_b"] is by_b else original(*args, **options)
    )

    reason = why_lora_differs(CPU, torch.float32)

    assert reason is not None
    assert f": {result} of the Triton kernels differs" in reason


def test_failing_kernel_is_rejected_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(segmented_lora, "shrink", fails)

    reason = why_lora_differs(CPU, torch.float32)

    assert reason is not None
    assert "no compiler" in reason
    assert "more" not in reason
