"""The comparison at start accepts the kernels, and names the result of one that differs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lora_core.kernels.gpu.comparison import INSTEAD, WIDEST_HEAD, Family, compare

FAMILIES: tuple[Family, ...] = get_args(Family)
CPU = torch.device("cpu")


def compared(family: Family, *, dtype: torch.dtype = torch.float32, is_capped: bool = True) -> str | None:
    size = 24 if family in ("attention", "decoding") else 0
    return compare.__wrapped__(family, CPU, dtype, size, is_capped)


@pytest.fixture(autouse=True)
def lora_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter rounds to bf16 toward zero, so LoRA is compared in fp32, which it refuses on a device."""
    monkeypatch.delitem(WIDEST_HEAD, "lora")


@pytest.mark.parametrize("is_capped", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_accepted(family: Family, is_capped: bool) -> None:
    assert compared(family, is_capped=is_capped) is None


def test_elementwise_kernels_are_accepted_in_bf16() -> None:
    assert compared("elementwise", dtype=torch.bfloat16) is None


def scaled(original: Callable[..., Any], index: int | None) -> Callable[..., Any]:
    """Return a kernel one of whose results is a percent too large: the returned one, or an argument."""

    def ruined(*arguments: Any, **options: Any) -> Any:
        made = original(*arguments, **options)
        found: Tensor = made if index is None else (arguments if made is None else made)[index]
        found.mul_(1.01)
        return made

    return ruined


def skipped(*_: Any, **__: Any) -> None:
    """A kernel that writes nothing."""


@pytest.mark.parametrize(
    ("family", "kernel", "index", "result"),
    [
        ("attention", "attention.attend", 0, "attention of"),
        ("attention", "attention.attend_backward", 0, "the gradient of queries"),
        ("attention", "attention.attend_backward", 1, "the gradient of keys"),
        ("attention", "attention.attend_backward", 2, "the gradient of values"),
        ("decoding", "decoding.attend_newest", None, "attention to 2 tokens"),
        ("elementwise", "elementwise.swiglu", 2, "silu(gate) · up"),
        ("elementwise", "elementwise.rms_norm_backward", 5, "the gradient of RMSNorm and of its sum"),
        ("elementwise", "elementwise.rotate", 9, "the rotation"),
        ("elementwise", "elementwise.logit_gradient", 0, "the gradient of cross-entropy"),
        ("elementwise", "optimizer.step_sizes", None, "sizes of an AdamW step"),
        ("elementwise", "random_numbers.draw_within", None, "a uniform number"),
    ],
)
def test_kernel_that_differs_is_named_by_its_result(
    monkeypatch: pytest.MonkeyPatch, family: Family, kernel: str, index: int | None, result: str
) -> None:
    module, _, name = kernel.partition(".")
    kernels = import_module(f"lora_core.kernels.gpu.{module}")
    monkeypatch.setattr(kernels, name, scaled(getattr(kernels, name), index))

    reason = compared(family)

    assert reason is not None
    assert reason.startswith(f"{INSTEAD[family]}: {result}")


@pytest.mark.parametrize(
    ("kernel", "by_b", "result"),
    [("expand", True, "y"), ("expand", False, "dx"), ("accumulate", True, "dB of linear 0")],
)
def test_lora_kernel_that_writes_nothing_is_named_by_its_result(
    monkeypatch: pytest.MonkeyPatch, kernel: str, by_b: bool, result: str
) -> None:
    from lora_core.kernels.gpu import segmented_lora

    original = getattr(segmented_lora, kernel)
    monkeypatch.setattr(
        segmented_lora, kernel, lambda *args, **options: None if options["by_b"] is by_b else original(*args, **options)
    )

    reason = compared("lora")

    assert reason is not None
    assert reason.startswith(f"{INSTEAD['lora']}: {result} of the Triton kernels differs")


def test_masks_of_other_bits_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_core.kernels.gpu import random_numbers

    original = random_numbers.draw_mask
    monkeypatch.setattr(random_numbers, "draw_mask", lambda key, threshold, like: original(key, threshold - 8, like))

    reason = compared("elementwise")

    assert reason is not None
    assert "a dropout mask of the Triton kernels differs" in reason


@pytest.mark.parametrize(("word", "change"), [(3, -1), (2, 1)], ids=["a token too early", "another capacity"])
def test_decoding_of_another_place_in_the_cache_differs(
    monkeypatch: pytest.MonkeyPatch, word: int, change: int
) -> None:
    from lora_core.kernels.gpu import decoding

    original = decoding.attend_newest

    def ruined(heads: Any, table_n4: Tensor, visible: Any) -> Tensor:
        table_n4[:, word] += change
        return original(heads, table_n4, visible)

    monkeypatch.setattr(decoding, "attend_newest", ruined)

    assert compared("decoding") is not None
