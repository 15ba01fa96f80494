# pyright: basic
"""Batch-invariant matmuls on a CPU: a row has the same bits whatever the number of rows.

With AMX the summation order of a kernel depends on the number of rows. At a fixed number of rows, each row has the same
bits at every position. The reference result is therefore that of blocks of ROW_BLOCK rows, the last padded with zeros.
A number of rows that passes a trial is computed at once, others in pieces that do. A piece is computed by several cores
if that passes a trial too. Letters: T rows, K summed, N columns.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.runtime.cpu_lanes import num_cores

ROW_BLOCK = 256
WIDTHS = (1024, 512)
"""Row counts of pieces that are tried before blocks. For 1,024 rows, blocks took 1.4 to 2.2 times as long as one
matmul."""
FILLED_ROWS = (64, 128)
"""Row counts to which smaller ones are padded if the bits match. 64 rows take a quarter to a half of a block's time."""
FEWEST_ROWS = 16
"""Smaller row counts are always padded: most kernels sum them in another order, and a trial of few rows may miss it."""
LARGE = 1 << 24
"""Matrix elements above which at most ROW_BLOCK rows are tried. A trial takes 1.3 to 6 times a block's time. For
smaller row counts, of which there are 15, it pays off within a tick or two. For larger ones, which may have any value,
a single matmul saves at most a third of the time of blocks, or nothing without AMX."""
UNTRIED_TIMES = 8
"""Calls with a matrix above LARGE and the same row count before its trial. The start-up self-test calls a head three to
six times with each row count, too few for a trial to pay off. The time of a trial does not affect the bits."""
MOST_BYTES = 1 << 29
"""Maximum size of a matrix that is tried, because a trial allocates another one, which no memory estimate includes.
Only heads are larger, in bf16 those with 128,256 tokens and at least 2,100 features."""
FEWEST_PRODUCTS = 1 << 22
"""Multiplications below which a matmul is too short for several cores: threads need about 20 µs to begin."""
PATTERN = 8191
"""Length of the pattern that trial inputs repeat: a prime, so that no two rows are equal."""
FACTOR = 0.7
"""Value of all elements of a trial's matrix. Products with it are inexact in fp32, so that rounding becomes visible."""
OCTAVES = 20
"""Range of magnitudes in trial inputs. Rounding then loses many bits, different ones in each summation order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A matmul by a [K, N] matrix with all properties that select a kernel, except the number of rows."""

    operation: Literal["mm", "addmm", "addmm_"]
    shape: tuple[int, int]
    stride: tuple[int, int]
    dtype: torch.dtype

    @property
    def num_numbers(self) -> int:
        """Number of elements of the matrix."""
        return self.shape[0] * self.shape[1]

    def compute(self, x_TK: Tensor, matrix_KN: Tensor, bias_N: Tensor | None, y_TN: Tensor) -> None:
        """Write to y, or add to it for "addmm_"."""
        if self.operation == "addmm_":
            y_TN.addmm_(x_TK, matrix_KN)
        elif bias_N is None:
            torch.mm(x_TK, matrix_KN, out=y_TN)
        else:
            torch.addmm(bias_N, x_TK, matrix_KN, out=y_TN)

    def matches_blocks(self, num_rows: int, row_block: int, *, num_threads: int = 1) -> bool:
        """Return whether a single matmul by that number of threads has the bits of blocks by one thread.

        Each row sums numbers and their negatives, so the result consists only of rounding errors, which depend on the
        order of summation.
        """
        num_summed, num_columns = self.shape
        x_TK, y_TN = _canceling(num_rows, num_summed, self.dtype), _numbers(num_rows, num_columns, self.dtype)
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        matrix_KN = torch.full((span,), FACTOR, dtype=self.dtype).as_strided(self.shape, self.stride)
        bias_N = torch.zeros(num_columns, dtype=self.dtype) if self.operation == "addmm" else None
        at_once_TN, in_blocks_TN = y_TN.clone(), y_TN.flip(0)
        with _threads(num_threads):
            self.compute(x_TK, matrix_KN, bias_N, at_once_TN)
        blocks = (row_block,) * -(-num_rows // row_block)
        self.in_pieces(blocks, x_TK.flip(0), matrix_KN, bias_N, in_blocks_TN)
        return torch.equal(at_once_TN, in_blocks_TN.flip(0))

    def in_pieces(
        self, sizes: tuple[int, ...], x_TK: Tensor, matrix_KN: Tensor, bias_N: Tensor | None, y_TN: Tensor
    ) -> None:
        """Compute pieces of `sizes` rows. The last may exceed the remaining rows and is padded. Needs contiguous y."""
        start = 0
        for size in sizes:
            x, y = x_TK[start : start + size], y_TN[start : start + size]
            if len(x) == size:
                self.compute(x, matrix_KN, bias_N, y)
            else:
                padding = (0, 0, 0, size - len(x))
                padded = F.pad(y, padding)
                self.compute(F.pad(x, padding), matrix_KN, bias_N, padded)
                y.copy_(padded[: len(y)])
            start += size


class ExactProducts:
    """Records which row counts give the bits of blocks. Shared by all lanes."""

    def __init__(self, row_block: int = ROW_BLOCK) -> None:
        self.row_block = row_block
        self._is_exact: dict[tuple[Product, int, int], bool] = {}
        self._pieces: dict[tuple[tuple[Product, ...], int, int], tuple[int, ...]] = {}
        self._is_shared: dict[tuple[Product, int, int], bool] = {}
        self._num_calls: Counter[tuple[tuple[Product, ...], int, int]] = Counter()
        self._trial_lock = Lock()  # one trial at a time, because each allocates a matrix

    def run(
        self,
        operation: Literal["mm", "addmm", "addmm_"],
        x_TK: Tensor,
        matrix_KN: Tensor,
        bias_N: Tensor | None,
        y_TN: Tensor,
    ) -> None:
        product = product_of(operation, matrix_KN)
        pieces = self.pieces((product,), len(x_TK))
        with _threads(self._num_threads(product, pieces)):
            product.in_pieces(pieces, x_TK.contiguous(), matrix_KN, bias_N, y_TN)

    def pieces(self, products: tuple[Product, ...], num_rows: int) -> tuple[int, ...]:
        """Return row counts for which all `products` give the bits of blocks. The last may exceed the rows left."""
        call = (products, num_rows, torch.get_num_threads())
        if call not in self._pieces and any(product.num_numbers > LARGE for product in products):
            self._num_calls[call] += 1
            if self._num_calls[call] <= UNTRIED_TIMES:
                return (self.row_block,) * -(-num_rows // self.row_block)
        return self._pieces_tried(products, num_rows)

    def _pieces_tried(self, products: tuple[Product, ...], num_rows: int) -> tuple[int, ...]:
        call = (products, num_rows, torch.get_num_threads())
        found = self._pieces.get(call)
        if found is None:
            found = self._pieces[call] = self._divided(products, num_rows)
        return found

    def _divided(self, products: tuple[Product, ...], num_rows: int) -> tuple[int, ...]:
        """Return as many pieces of the first suitable width as fit. The remaining rows are split recursively."""
        if num_rows == 0:
            return ()
        width = next(
            width
            for width in self._widths(num_rows)
            if all(self._is_batch_invariant(product, width) for product in products)
        )
        whole, rest = divmod(num_rows, width)
        return (width,) * whole + self._pieces_tried(products, rest) if whole else (width,)

    def _widths(self, num_rows: int) -> tuple[int, ...]:
        """Return candidate widths of pieces, the fastest first. The last one is a block, which is always valid."""
        if num_rows > self.row_block:
            narrower = tuple(width for width in WIDTHS if self.row_block < width < num_rows)
        else:
            narrower = tuple(width for width in FILLED_ROWS if num_rows < width < self.row_block)
        return (num_rows, *narrower, self.row_block)

    def _is_batch_invariant(self, product: Product, num_rows: int) -> bool:
        if num_rows == self.row_block or not self._can_be_tried(product, num_rows):
            return num_rows == self.row_block
        call = (product, num_rows, torch.get_num_threads())
        with self._trial_lock:
            if call not in self._is_exact:
                self._is_exact[call] = product.matches_blocks(num_rows, self.row_block)
            return self._is_exact[call]

    def _num_threads(self, product: Product, pieces: tuple[int, ...]) -> int:
        """Return the number of threads for these pieces: all cores of the caller if the bits stay the same."""
        wanted = num_cores()
        if wanted == 1 or torch.get_num_threads() > 1 or min(pieces, default=0) * product.num_numbers < FEWEST_PRODUCTS:
            return 1
        return wanted if all(self._can_be_shared(product, rows, wanted) for rows in set(pieces)) else 1

    def _can_be_shared(self, product: Product, num_rows: int, num_threads: int) -> bool:
        call = (product, num_rows, num_threads)
        if call not in self._is_shared and product.num_numbers > LARGE:
            self._num_calls[(product,), num_rows, num_threads] += 1
            if self._num_calls[(product,), num_rows, num_threads] <= UNTRIED_TIMES:
                return False
        with self._trial_lock:
            if call not in self._is_shared:
                is_small_enough = num_rows == self.row_block or self._can_be_tried(product, num_rows)
                self._is_shared[call] = is_small_enough and product.matches_blocks(
                    num_rows, self.row_block, num_threads=num_threads
                )
            return self._is_shared[call]

    def _can_be_tried(self, product: Product, num_rows: int) -> bool:
        is_large = product.num_numbers > LARGE
        has_room = product.num_numbers * product.dtype.itemsize <= MOST_BYTES
        return num_rows >= FEWEST_ROWS and has_room and not (is_large and num_rows > self.row_block)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads in operations of the calling thread."""
    if count == 1:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def product_of(operation: Literal["mm", "addmm", "addmm_"], matrix_KN: Tensor) -> Product:
    rows, columns = matrix_KN.shape
    stride: Any = matrix_KN.stride()
    return Product(operation=operation, shape=(rows, columns), stride=stride, dtype=matrix_KN.dtype)


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, exact: ExactProducts | None) -> Tensor:
    """Return x Wᵀ + b, [T, N]. Not differentiable."""
    if exact is None:
        return F.linear(x_TK, weight_NK, bias_N)
    y_TN = x_TK.new_empty(len(x_TK), len(weight_NK))
    exact.run("mm" if bias_N is None else "addmm", x_TK, weight_NK.T, bias_N, y_TN)
    return y_TN


def times(x_TK: Tensor, matrix_KN: Tensor, exact: ExactProducts | None) -> Tensor:
    """Return x M, [T, N]. Not differentiable."""
    if exact is None:
        return x_TK @ matrix_KN
    y_TN = x_TK.new_empty(len(x_TK), matrix_KN.shape[1])
    exact.run("mm", x_TK, matrix_KN, None, y_TN)
    return y_TN


def add_times(y_TN: Tensor, x_TK: Tensor, matrix_KN: Tensor, exact: ExactProducts | None) -> Tensor:
    """Compute y += x M in place and return y."""
    if exact is None:
        return y_TN.addmm_(x_TK, matrix_KN)
    exact.run("addmm_", x_TK, matrix_KN, None, y_TN)
    return y_TN


def own_forward(linear: Any, x_TK: Tensor, num_columns: int, exact: ExactProducts | None) -> Tensor:
    """Run the own forward of a linear, such as a quantized or sharded one, batch-invariantly. It is differentiable.

    It assumes that the forward ends in plain matmuls of the linear's size. The start-up self-test verifies this up to
    the size of its packs.
    """
    if exact is None:
        return type(linear).forward(linear, x_TK)
    num_rows, num_summed = x_TK.shape
    forward_product = Product(
        operation="mm" if getattr(linear, "bias", None) is None else "addmm",
        shape=(num_summed, num_columns),
        stride=(1, num_summed),
        dtype=x_TK.dtype,
    )
    backward_product = Product(
        operation="mm", shape=(num_columns, num_summed), stride=(num_summed, 1), dtype=x_TK.dtype
    )
    sizes = exact.pieces((forward_product, backward_product), num_rows)
    padded = F.pad(x_TK, (0, 0, 0, sum(sizes) - num_rows))
    return torch.cat([type(linear).forward(linear, part) for part in padded.split(list(sizes))])[:num_rows]


def _canceling(num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    """Return [rows, columns] in which each row contains numbers and, in another order, their negatives."""
    half = num_columns // 2
    numbers = _numbers(num_rows, half, dtype)
    return F.pad(torch.cat([numbers, -numbers.roll(half // 3, 1)], dim=1), (0, num_columns - 2 * half))


def _numbers(num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    """Return [rows, columns] of both signs and of magnitudes within 2 ** OCTAVES."""
    return (
        _pattern(dtype)
        .repeat(-(-num_rows * num_columns // PATTERN))[: num_rows * num_columns]
        .view(num_rows, num_columns)
    )


@cache
def _pattern(dtype: torch.dtype) -> Tensor:
    steps = torch.arange(PATTERN, dtype=torch.float64)
    return (torch.sin(steps**2) * 2 ** (steps * 7 % OCTAVES)).to(dtype)
