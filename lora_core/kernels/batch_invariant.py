# pyright: basic
"""Batch-invariant matmuls on a CPU: a row has the same bits whatever the number of rows.

ExactProducts explains how. docs/internals/equivalence-proof.md proves from it that an adapter has the same bits in any
company. Letters: T rows, K summed, N columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels import few_rows
from lora_core.kernels.numba_jit import runs_on
from lora_core.runtime.cpu_lanes import num_cores

ROW_BLOCK = 256
WIDE_ROWS = (1024, 512)
"""Numbers of rows of pieces that are tried before blocks."""
FILLED_ROWS = (64, 128)
"""Numbers of rows to which fewer are padded before they are padded to a block. 64 rows take a quarter to a half of its
time."""
FEWEST_ROWS = 16
"""Fewer rows are padded, unless few_rows.py computes them: most kernels of torch sum them in another order, and a trial
of few rows may miss it."""
LARGE = 1 << 24
"""Matrix elements above which at most ROW_BLOCK rows are tried. A trial takes 1.3 to 6 times a block's time. For the
numbers of rows below a block, of which there are 15 in a pack, it pays off within a tick or two. Above it they may have
any value, and a single matmul saves at most a third of the time of blocks, or nothing without AMX."""
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

    @property
    def num_bytes(self) -> int:
        """Size of the matrix."""
        return self.num_numbers * self.dtype.itemsize

    def compute(self, x_TK: Tensor, matrix_KN: Tensor, bias_N: Tensor | None, y_TN: Tensor) -> None:
        """Write to y, or add to it for "addmm_"."""
        if self.operation == "addmm_":
            y_TN.addmm_(x_TK, matrix_KN)
        elif bias_N is None:
            torch.mm(x_TK, matrix_KN, out=y_TN)
        else:
            torch.addmm(bias_N, x_TK, matrix_KN, out=y_TN)

    def matches_blocks(self, num_rows: int, row_block: int, num_threads: int) -> bool:
        """Return whether a single matmul by that number of threads has the bits of blocks by the threads of a lane."""
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

    def run_ends(self, row_block: int) -> Tensor | None:
        """Return the ends of runs [R] with which few_rows.py has the bits of blocks. None if there are none."""
        num_summed, num_columns = self.shape
        run_ends = self._probe_run_ends(row_block)
        x_TK = _canceling(few_rows.MAX_ROWS, num_summed, self.dtype)
        weight_NK = torch.full((num_columns, num_summed), FACTOR, dtype=self.dtype)
        bias_N = _numbers(1, num_columns, self.dtype)[0].contiguous() if self.operation == "addmm" else None
        found_TN, expected_TN = x_TK.new_empty(2, len(x_TK), num_columns)
        self.in_pieces((row_block,), x_TK, weight_NK.T, bias_N, expected_TN)
        few_rows.multiply(x_TK, weight_NK, bias_N, found_TN, run_ends)
        return run_ends if torch.equal(found_TN, expected_TN) else None

    def _probe_run_ends(self, row_block: int) -> Tensor:
        """Return the ends of the runs in which a block adds, if it adds in runs (few_rows.py).

        Each column adds 1, the first summand, and two neighbors of half the distance from 1 to the next number. The
        result is above 1 only if the neighbors were added to each other first. Then they lie in one run, not the first.
        A run of one summand has no neighbors and is not found.
        """
        num_summed, num_columns = self.shape
        x_1K = torch.full((1, num_summed), torch.finfo(self.dtype).eps / 2, dtype=self.dtype)
        x_1K[:, 0] = 1
        bias_N = torch.zeros(num_columns, dtype=self.dtype) if self.operation == "addmm" else None
        weight_NK, y_1N = torch.zeros(num_columns, num_summed, dtype=self.dtype), x_1K.new_empty(1, num_columns)
        is_together = torch.zeros(num_summed, dtype=torch.bool)
        """Whether a summand and the next one lie in one run, not the first."""
        for neighbors in torch.arange(1, max(1, num_summed - 1)).split(num_columns):
            columns = torch.arange(len(neighbors))
            weight_NK.zero_()[:, 0] = 1
            weight_NK[columns, neighbors] = weight_NK[columns, neighbors + 1] = 1
            self.in_pieces((row_block,), x_1K, weight_NK.T, bias_N, y_1N)
            is_together[neighbors] = y_1N[0, : len(neighbors)] > 1
        starts = 1 + (is_together[1:] & ~is_together[:-1]).nonzero()[:, 0]
        return torch.cat([starts, torch.tensor([num_summed])])

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
    """Divides matmuls into pieces that have the bits of blocks. Remembers the trials. Shared by all lanes.

    A row of x M is a sum over K products. A kernel chooses the order of that sum by the shapes and strides of the
    matmul. So the bits of a row depend on how many other rows there are: below 16 rows always, with AMX at many numbers
    of rows. At a fixed number of rows, each row has the same bits at every position, whatever the other rows contain.
    Jobs train together, and their rows come and go. So:

    - **Definition.** The result of a matmul is that of blocks of ROW_BLOCK rows, the last one padded with zeros. It
      does not depend on company, but is slow: a single row takes a whole block, and 1,024 rows in blocks take 1.4 to
      2.2 times as long as in one matmul.
    - **Trial** (`Product.matches_blocks`). A number of rows other than a block is used if it gives the bits of blocks.
      That is tried once for each matmul, with synthetic numbers. Each row of x contains numbers and their negatives in
      another order, and all elements of M are equal. The exact sum is 0, so the output consists of rounding errors,
      which differ in nearly every element between two orders of summation. The blocks get the rows in reverse order, so
      that the trial also compares positions.
    - **Pieces** (`pieces`). If all rows at once fail the trial, they are divided into pieces that pass. The last piece
      may exceed the rows that are left. It is padded.
    - **Few rows.** A kernel that reads the matrix once (few_rows.py) computes up to 8 rows by fp32 weights [N, K], if
      it has the bits of blocks in such a trial. `Product.run_ends` finds the order in which it must add.
    - **Cores.** A lane has one core (runtime/cpu_lanes.py). If there are fewer parts than cores, a matmul uses several
      of them, after another trial with that number of threads.
    """

    def __init__(self, row_block: int = ROW_BLOCK) -> None:
        self.row_block = row_block
        self._pieces: dict[tuple[tuple[Product, ...], int, int], tuple[int, ...]] = {}
        self._trials: dict[tuple[Product, int, int], bool] = {}
        """The outcome by matmul, number of rows and number of threads."""
        self._run_ends: dict[tuple[Product, int], Tensor | None] = {}
        """The ends of the runs of few rows by matmul and number of threads."""
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
        run_ends = self._find_run_ends(product) if len(x_TK) <= few_rows.MAX_ROWS and runs_on(x_TK) else None
        if run_ends is not None:
            few_rows.multiply(x_TK, matrix_KN.T, bias_N, y_TN, run_ends)
            return
        pieces = self.pieces((product,), len(x_TK))
        with _threads(self._num_threads(product, pieces)):
            product.in_pieces(pieces, x_TK.contiguous(), matrix_KN, bias_N, y_TN)

    def _find_run_ends(self, product: Product) -> Tensor | None:
        """Return the ends of the runs of few rows, which the first call finds. None: few rows are padded."""
        num_summed, num_columns = product.shape
        if (
            product.operation == "addmm_"
            or product.dtype != torch.float32
            or product.stride != (1, num_summed)
            or num_columns < few_rows.COLUMNS
            or product.num_bytes > MOST_BYTES
        ):
            return None
        call = (product, torch.get_num_threads())
        with self._trial_lock:
            if call not in self._run_ends:
                self._run_ends[call] = product.run_ends(self.row_block)
            return self._run_ends[call]

    def pieces(self, products: tuple[Product, ...], num_rows: int) -> tuple[int, ...]:
        """Return row counts for which all `products` give the bits of blocks. The last may exceed the rows left."""
        call = (products, num_rows, torch.get_num_threads())
        found = self._pieces.get(call)
        if found is None:
            found = self._pieces[call] = self._divided(products, num_rows)
        return found

    def _divided(self, products: tuple[Product, ...], num_rows: int) -> tuple[int, ...]:
        """Take as many pieces as possible of the fastest width that has the bits of blocks. Repeat for the rest."""
        pieces: list[int] = []
        num_threads = torch.get_num_threads()
        while (left := num_rows - sum(pieces)) > 0:
            if left > self.row_block:
                others = [width for width in WIDE_ROWS if self.row_block < width < left]
            else:
                others = [width for width in FILLED_ROWS if left < width < self.row_block]
            width = next(
                width
                for width in (left, *others, self.row_block)
                if all(self._matches_blocks(product, width, num_threads) for product in products)
            )
            pieces += [width] * max(1, left // width)
        return tuple(pieces)

    def _num_threads(self, product: Product, pieces: tuple[int, ...]) -> int:
        """Return the number of threads for these pieces: all cores of the caller if the bits stay the same."""
        own, wanted = torch.get_num_threads(), num_cores()
        if wanted == 1 or own > 1 or min(pieces, default=0) * product.num_numbers < FEWEST_PRODUCTS:
            return own
        return wanted if all(self._matches_blocks(product, rows, wanted) for rows in set(pieces)) else own

    def _matches_blocks(self, product: Product, num_rows: int, num_threads: int) -> bool:
        """Return the outcome of the trial, which is made at the first call. Without a trial, only blocks match."""
        if num_rows == self.row_block and num_threads == torch.get_num_threads():
            return True
        is_large = product.num_numbers > LARGE and num_rows > self.row_block
        if num_rows < FEWEST_ROWS or product.num_bytes > MOST_BYTES or is_large:
            return False
        call = (product, num_rows, num_threads)
        with self._trial_lock:
            if call not in self._trials:
                self._trials[call] = product.matches_blocks(num_rows, self.row_block, num_threads)
            return self._trials[call]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads in operations of the calling thread."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def product_of(operation: Literal["mm", "addmm", "addmm_"], matrix_KN: Tensor) -> Product:
    rows, columns = matrix_KN.shape
    stride: Any = matrix_KN.stride()
    return Product(operation=operation, shape=(rows, columns), stride=stride, dtype=matrix_KN.dtype)


def linear(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, exact: ExactProducts | None, num_used: int | None = None
) -> Tensor:
    """Return x Wᵀ + b, [T, N]. Not differentiable. Rows from `num_used` on are padding: their result may be 0."""
    if exact is None:
        return F.linear(x_TK, weight_NK, bias_N)
    operation = "mm" if bias_N is None else "addmm"
    if num_used is None or num_used > few_rows.MAX_ROWS:
        y_TN = x_TK.new_empty(len(x_TK), len(weight_NK))
        exact.run(operation, x_TK, weight_NK.T, bias_N, y_TN)
    else:
        y_TN = x_TK.new_zeros(len(x_TK), len(weight_NK))
        exact.run(operation, x_TK[:num_used], weight_NK.T, bias_N, y_TN[:num_used])
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
