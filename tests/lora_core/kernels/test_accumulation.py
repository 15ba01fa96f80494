"""A product is added to an fp32 sum: on a CPU rounded first, on a GPU in one operation where torch supports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.kernels import accumulation
from lora_core.kernels.accumulation import add_product, adds_in_float32

ADDMM = torch.addmm


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    adds_in_float32.cache_clear()
    yield
    adds_in_float32.cache_clear()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulation, "on_gpu", lambda _: True)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(dtype)


def added(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum, that of rounded products, and that of products that are not rounded."""
    total, a, b = numbers(9, 7), numbers(9, 40, dtype=dtype), numbers(40, 7, dtype=dtype)
    rounded, exact = total + a @ b, total + a.float() @ b.float()
    add_product(total, a, b)
    return total, rounded, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_the_product_is_rounded_first(dtype: torch.dtype) -> None:
    total, rounded, _ = added(dtype)

    assert torch.equal(total, rounded)


def test_on_a_gpu_the_product_is_not_rounded(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_cuda(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert total is out
        assert total.dtype == out_dtype == torch.float32
        assert a.dtype == b.dtype == torch.bfloat16
        return ADDMM(total, a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "addmm", as_on_cuda)

    total, rounded, exact = added(torch.bfloat16)

    torch.testing.assert_close(total, exact)
    assert not torch.equal(total, rounded)


def test_on_a_gpu_a_product_of_the_same_dtype_is_added_in_place(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "addmm")

    total, _, exact = added(torch.float32)

    torch.testing.assert_close(total, exact)


def wrong(total: Tensor, a: Tensor, b: Tensor, **_: Any) -> None:
    """Forget the sum before."""
    total.copy_(a.float() @ b.float())


def refusing(*_: Any, **__: Any) -> None:
    raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")


@pytest.mark.parametrize("operation", [wrong, refusing])
def test_without_support_of_torch_the_product_is_rounded_first(
    on_gpu: None, monkeypatch: pytest.MonkeyPatch, operation: Any
) -> None:
    monkeypatch.setattr(torch, "addmm", operation)

    total, rounded, _ = added(torch.bfloat16)

    assert torch.equal(total, rounded)
