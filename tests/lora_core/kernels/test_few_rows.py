"""The matmul of few rows adds in the order that it is given, and has the bits of blocks wherever it is used."""

import pytest
import torch
from torch import Tensor

from lora_core.kernels import batch_invariant, few_rows
from lora_core.kernels.batch_invariant import ExactProducts, Product, linear, product_of
from lora_core.packing import packed_batch

BLOCK = 32
HUGE = float(1 << 24)
"""HUGE + 1 is rounded to HUGE in fp32."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None = None, ends: tuple[int, ...] = ()) -> Tensor:
    """Multiply in runs that end at `ends` and at the last summand."""
    y = torch.full((len(x), len(weight)), torch.nan)
    few_rows.multiply(x, weight, bias, y, torch.tensor([*ends, x.shape[1]]))
    return y


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(
    ("summed", "columns", "ends"),
    [(1, 8, ()), (15, 9, ()), (16, 16, (3,)), (33, 23, (16, 32)), (100, 64, (40, 57))],
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_product_has_the_values_of_a_plain_matmul(rows, summed, columns, ends, has_bias):
    x, weight, bias = drawn(rows, summed), drawn(columns, summed, seed=1), drawn(columns, seed=2) if has_bias else None

    found = multiplied(x, weight, bias, ends)

    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("summands", "bias", "ends", "expected"),
    [
        pytest.param([HUGE, 1, 1, -HUGE], 0, (), 0, id="one run from the first summand to the last"),
        pytest.param([HUGE, 1, 1, -HUGE], 0, (2,), 1, id="two runs whose sums are added"),
        pytest.param([HUGE, 1, 1, 1, -HUGE], 0, (1, 3), 3, id="runs of unequal lengths"),
        pytest.param([1, 1], HUGE, (), HUGE + 2, id="the bias is added after the run"),
        pytest.param([1, 1], HUGE, (1,), HUGE, id="the bias is added to the first run"),
    ],
)
def test_summands_are_added_in_runs(summands, bias, ends, expected):
    found = multiplied(
        torch.tensor([summands]).float(), torch.ones(8, len(summands)), torch.full((8,), bias).float(), ends
    )

    assert found.tolist() == [[expected] * 8]


def test_products_are_not_rounded_before_they_are_added():
    little = 2.0**-12
    x, weight = torch.tensor([[-(1 + 2 * little), 1 + little]]), torch.tensor([[1, 1 + little]]).repeat(8, 1)

    assert multiplied(x, weight).tolist() == [[little**2] * 8]


@pytest.fixture
def blocks_in_runs(monkeypatch):
    """Return a function that lets blocks add 1,000 summands in runs with the given ends, and few rows 16 at a time."""
    run_ends: list[int] = []

    def compute(_: Product, x_TK: Tensor, matrix_KN: Tensor, bias_N: Tensor | None, y_TN: Tensor) -> None:
        ends = torch.tensor([*(run_ends if len(x_TK) == BLOCK else range(16, 1000, 16)), 1000])
        for rows, y in zip(x_TK.split(8), y_TN.split(8), strict=True):
            few_rows.multiply(rows, matrix_KN.T, bias_N, y, ends)

    monkeypatch.setattr(Product, "compute", compute)
    return run_ends.extend


@pytest.mark.parametrize("ends", [(), (320, 640, 960), (384, 692), (2, 998)])
@pytest.mark.parametrize("bias", [None, drawn(24, seed=2)])
def test_few_rows_have_the_bits_of_a_block(bias, ends, blocks_in_runs, monkeypatch):
    blocks_in_runs(ends)
    x, weight, exact = drawn(BLOCK, 1000), drawn(24, 1000, seed=1), ExactProducts(BLOCK)
    whole = linear(x, weight, bias, exact)

    few_TN = linear(x[:1], weight, bias, exact)
    monkeypatch.setattr(Product, "compute", None)  # from now on, rows can't be padded

    assert torch.equal(few_TN, whole[:1])
    for number in range(2, 9):
        assert torch.equal(linear(x[:number], weight, bias, exact), whole[:number])


@pytest.mark.parametrize("summed", [48, 576, 1000])
def test_few_rows_have_the_bits_of_many_with_the_kernels_of_torch(summed):
    x, weight, exact = drawn(40, summed), drawn(72, summed, seed=1), ExactProducts()

    assert torch.equal(linear(x[:5], weight, None, exact), linear(x, weight, None, exact)[:5])


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        pytest.param(drawn(24, 1000).bfloat16(), None, id="bf16"),
        pytest.param(drawn(1000, 24).T, None, id="by columns"),
        pytest.param(drawn(7, 1000), None, id="fewer than 8 columns"),
        pytest.param(drawn(24, 1000), drawn(24), id="too large for a trial"),
    ],
)
def test_other_few_rows_are_padded(weight, bias, monkeypatch):
    x, whole = drawn(3, 1000).to(weight.dtype), ExactProducts(BLOCK)
    if bias is not None:
        monkeypatch.setattr(batch_invariant, "MOST_BYTES", 1000)
    monkeypatch.setattr(few_rows, "multiply", None)

    found = linear(x, weight, bias, whole)

    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias), rtol=2e-2, atol=2e-2)


def test_few_rows_are_padded_if_no_order_has_the_bits_of_a_block(blocks_in_runs):
    blocks_in_runs((999,))  # a run of one summand is not found
    x, weight, exact = drawn(BLOCK, 1000), drawn(24, 1000, seed=1), ExactProducts(BLOCK)

    assert torch.equal(linear(x[:3], weight, None, exact), linear(x, weight, None, exact)[:3])
    assert exact.pieces((product_of("mm", weight.T),), 3) == (BLOCK,)


def test_padding_is_not_computed(blocks_in_runs):
    blocks_in_runs((320, 640, 960))
    x, weight, exact = drawn(16, 1000), drawn(24, 1000, seed=1), ExactProducts(BLOCK)

    found = linear(x, weight, None, exact, num_used=5)

    assert torch.equal(found[:5], linear(x, weight, None, exact)[:5])
    assert not found[5:].any()


def test_number_of_used_rows_is_unknown_outside_a_pass():
    assert packed_batch.num_used_rows() is None
