# pyright: basic
"""Products whose rows don't depend on how many there are, where the CPU's own ones do.

With AMX a bf16 product sums in an order that follows from its number of rows, so packmates would change a job's bits.
In a product of a fixed number of rows each row has the same bits wherever it stands and whatever the others hold. So
there all products over the tokens of several jobs are made of blocks of ROW_BLOCK rows, the last one filled up with
zeros. Letters: T rows, K summed, N columns.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_BLOCK = 256
"""Smaller ones fill up less and cost more: of 768 rows, blocks of 256 took 1.3 to 1.5 times the time of one product,
blocks of 128 took 1.7 to 2.2."""
ALL_ROWS, ASKED_ROWS = 320, (16, 32, 48, 128, 256)


Product = Callable[[Tensor], Tensor]


@torch.no_grad()
def needed_row_block(products: Iterable[tuple[Product, int]], dtype: torch.dtype) -> int | None:
    """ROW_BLOCK where one of these products of x [T, K], given with their K, depends on T; None elsewhere."""
    return ROW_BLOCK if any(_depends_on_rows(product, _rows(columns, dtype)) for product, columns in products) else None


def both_ways(weight_NK: Tensor) -> tuple[tuple[Product, int], ...]:
    """x Wᵀ as in a forward, and dy W as in a backward."""
    return (
        (lambda x_TK: F.linear(x_TK, weight_NK), weight_NK.shape[1]),
        (lambda dy_TN: dy_TN @ weight_NK, weight_NK.shape[0]),
    )


def _depends_on_rows(product: Product, x_TK: Tensor) -> bool:
    whole_TN = product(x_TK)
    return any(not torch.equal(product(x_TK[:rows]), whole_TN[:rows]) for rows in ASKED_ROWS)


def _rows(num_columns: int, dtype: torch.dtype) -> Tensor:
    numbers = torch.arange(ALL_ROWS * num_columns, dtype=torch.float32)
    return torch.sin(numbers * 0.7).view(ALL_ROWS, num_columns).to(dtype)


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, row_block: int | None) -> Tensor:
    """x Wᵀ + b. Not for autograd."""
    if row_block is None:
        return F.linear(x_TK, weight_NK, bias_N)
    y_TN = x_TK.new_empty(len(x_TK), len(weight_NK))
    _in_blocks(x_TK, y_TN, row_block, lambda x, y: _multiply(x, weight_NK.T, bias_N, y))
    return y_TN


def times(x_TK: Tensor, matrix_KN: Tensor, row_block: int | None) -> Tensor:
    """x M. Not for autograd."""
    if row_block is None:
        return x_TK @ matrix_KN
    y_TN = x_TK.new_empty(len(x_TK), matrix_KN.shape[1])
    _in_blocks(x_TK, y_TN, row_block, lambda x, y: _multiply(x, matrix_KN, None, y))
    return y_TN


def add_times(y_TN: Tensor, x_TK: Tensor, matrix_KN: Tensor, row_block: int | None) -> Tensor:
    """y += x M, in place."""
    if row_block is None:
        return y_TN.addmm_(x_TK, matrix_KN)
    _in_blocks(x_TK, y_TN, row_block, lambda x, y: y.addmm_(x, matrix_KN))
    return y_TN


def forward_in_blocks(forward: Callable[[Tensor], Tensor], x_TK: Tensor, row_block: int | None) -> Tensor:
    """A linear with a forward of its own, which autograd may follow."""
    if row_block is None:
        return forward(x_TK)
    filled = F.pad(x_TK, (0, 0, 0, -len(x_TK) % row_block))
    return torch.cat([forward(block) for block in filled.split(row_block)])[: len(x_TK)]


def _multiply(x_TK: Tensor, matrix_KN: Tensor, bias_N: Tensor | None, y_TN: Tensor) -> None:
    if bias_N is None:
        torch.mm(x_TK, matrix_KN, out=y_TN)
    else:
        torch.addmm(bias_N, x_TK, matrix_KN, out=y_TN)


def _in_blocks(x_TK: Tensor, y_TN: Tensor, row_block: int, compute: Callable[[Tensor, Tensor], object]) -> None:
    """compute(x, y) of each block; `y_TN` is contiguous, and so is every block of it."""
    whole = len(x_TK) - len(x_TK) % row_block
    for start in range(0, whole, row_block):
        compute(x_TK[start : start + row_block], y_TN[start : start + row_block])
    left = len(x_TK) - whole
    if left:
        filler = (0, 0, 0, row_block - left)
        filled = F.pad(y_TN[whole:], filler)
        compute(F.pad(x_TK[whole:], filler), filled)
        y_TN[whole:] = filled[:left]
