"""Batch-invariant matmuls give the values of plain ones, and no row's bits depend on the number of rows."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core.base_model import patching
from lora_core.base_model.model import BaseModel
from lora_core.engine.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.kernels import batch_invariant
from lora_core.kernels.batch_invariant import (
    FEWEST_ROWS,
    ExactProducts,
    Product,
    add_times,
    linear,
    own_forward,
    product_of,
    times,
)
from lora_core.runtime.cpu_lanes import Lanes
from tests.lora_core.scenarios import admit, preferences, run_alone, run_elastically, submissions

BLOCK = 32
aten = torch.ops.aten


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


OWN = nn.Linear(48, 24)
PRODUCTS: dict[str, Callable[[Tensor, ExactProducts | None], Tensor]] = {
    "linear": lambda x, exact: linear(x, drawn(24, 48, seed=1), None, exact),
    "linear with bias": lambda x, exact: linear(x, drawn(24, 48, seed=1), drawn(24, seed=2), exact),
    "times": lambda x, exact: times(x, drawn(48, 24, seed=1), exact),
    "add_times": lambda x, exact: add_times(drawn(len(x), 24, seed=3), x, drawn(48, 24, seed=1), exact),
    "custom forward": lambda x, exact: own_forward(OWN, x, 24, exact),
}


def compute_by_number(self: Product, x_TK: Tensor, matrix_KN: Tensor, bias_N: Tensor | None, y_TN: Tensor) -> None:
    """A kernel that sums few rows, more rows and many rows in three different orders."""
    parts = 1 if len(x_TK) in range(24, 70) else 2 if len(x_TK) < 24 else 3
    total = y_TN.float() if self.operation == "addmm_" else torch.zeros(()) if bias_N is None else bias_N.float()
    for x_Tk, matrix_kN in zip(x_TK.float().chunk(parts, 1), matrix_KN.float().chunk(parts, 0), strict=True):
        total = total + in_order(x_Tk, matrix_kN)
    y_TN.copy_(total)


def in_order(x_TK: Tensor, matrix_KN: Tensor) -> Tensor:
    total = torch.zeros(len(x_TK), matrix_KN.shape[1])
    for x_T, row_N in zip(x_TK.T, matrix_KN, strict=True):
        total += x_T[:, None] * row_N
    return total


@pytest.fixture
def depends_on_rows(monkeypatch):
    monkeypatch.setattr(Product, "compute", compute_by_number)


@pytest.fixture
def always_in_blocks(monkeypatch):
    monkeypatch.setattr(Product, "matches_blocks", lambda *_: False)
    monkeypatch.setattr(patching, "ExactProducts", lambda: ExactProducts(BLOCK))


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 96, 100])
def test_blocks_give_the_values_of_a_plain_matmul(name, rows, always_in_blocks):
    x = drawn(rows, 48)

    in_blocks = PRODUCTS[name](x, ExactProducts(BLOCK))

    torch.testing.assert_close(in_blocks, PRODUCTS[name](x, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name not in ("add_times", "custom forward")])
def test_row_keeps_its_bits_at_any_position_and_row_count(name, depends_on_rows):
    rows, exact = drawn(100, 48), ExactProducts(BLOCK)
    whole = PRODUCTS[name](rows, exact)

    order = torch.randperm(100, generator=torch.Generator().manual_seed(4))

    assert torch.equal(PRODUCTS[name](rows[order], exact), whole[order])
    for number in range(1, 100, 7):
        assert torch.equal(PRODUCTS[name](rows[:number], exact), whole[:number])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", ["mm", "addmm", "addmm_"])
@pytest.mark.parametrize("columns", [8, 24])
def test_trial_finds_every_row_count_with_another_summation_order(operation, dtype, columns, depends_on_rows):
    product = Product(operation=operation, shape=(48, columns), stride=(1, 48), dtype=dtype)

    same = {rows for rows in range(FEWEST_ROWS, 100) if product.matches_blocks(rows, BLOCK, 1)}

    assert same == set(range(24, 70))


def test_trial_finds_a_row_count_without_fused_multiply_add(monkeypatch):
    """The order is the same: this row count multiplies and adds where others use a fused operation."""

    def compute(_: Product, x_TK: Tensor, matrix_KN: Tensor, _bias: Tensor | None, y_TN: Tensor) -> None:
        y_TN.zero_()
        for x_T, row_N in zip(x_TK.T, matrix_KN, strict=True):
            added = x_T[:, None].double() * row_N
            y_TN.copy_(y_TN + (added.float() if len(x_TK) == 40 else added))

    monkeypatch.setattr(Product, "compute", compute)
    product = Product(operation="mm", shape=(48, 8), stride=(1, 48), dtype=torch.float32)

    assert [product.matches_blocks(rows, BLOCK, 1) for rows in (36, 40)] == [True, False]


def test_rows_are_computed_in_the_fewest_pieces_that_keep_the_bits(depends_on_rows):
    exact, product = ExactProducts(BLOCK), product_of("mm", drawn(48, 24))

    pieces = {rows: exact.pieces((product,), rows) for rows in (4, 16, 24, 69, 72, 90)}

    assert pieces == {4: (32,), 16: (32,), 24: (24,), 69: (69,), 72: (32, 32, 32), 90: (32, 32, 26)}


@pytest.mark.parametrize("has_same_bits", [True, False])
def test_several_cores_compute_a_matmul_if_its_bits_stay_the_same(monkeypatch, has_same_bits):
    used: list[int] = []

    def compute(_: Product, x_TK: Tensor, matrix_KN: Tensor, _bias: Tensor | None, y_TN: Tensor) -> None:
        used.append(torch.get_num_threads())
        half = slice(0, None) if used[-1] == 1 or has_same_bits else slice(24, None)
        y_TN.copy_(in_order(x_TK[:, half], matrix_KN[half]) + in_order(x_TK[:, : half.start], matrix_KN[: half.start]))

    monkeypatch.setattr(Product, "compute", compute)
    monkeypatch.setattr(batch_invariant, "FEWEST_PRODUCTS", 0)
    x, exact = drawn(40, 48), ExactProducts(BLOCK)
    expected = PRODUCTS["linear"](x, exact)
    (of_lane,) = Lanes(2).run(lambda given: PRODUCTS["linear"](given, exact), [x])

    assert torch.equal(of_lane, expected)
    assert used[-1] == (2 if has_same_bits else 1)
    assert torch.get_num_threads() == 1


def test_short_matmuls_are_computed_by_one_core(monkeypatch):
    used: list[int] = []
    monkeypatch.setattr(
        Product, "compute", lambda _, x, matrix, __, y: (used.append(torch.get_num_threads()), y.copy_(x @ matrix))
    )
    Lanes(2).run(lambda x: PRODUCTS["linear"](x, ExactProducts(BLOCK)), [drawn(40, 48)])

    assert set(used) == {1}


def test_batch_invariant_kernel_computes_all_rows_at_once(monkeypatch):
    exact, product = ExactProducts(BLOCK), product_of("mm", drawn(64, 64))
    monkeypatch.setattr(Product, "compute", lambda _, x, matrix, __, y: y.copy_(in_order(x, matrix)))

    pieces = [exact.pieces((product,), rows) for rows in (16, 300, 2000)]

    assert pieces == [(16,), (300,), (2000,)]


def test_few_rows_are_padded_to_the_smallest_count_that_keeps_the_bits(depends_on_rows, monkeypatch):
    monkeypatch.setattr(batch_invariant, "FILLED_ROWS", (20, 24, 28))
    exact, product = ExactProducts(BLOCK), product_of("mm", drawn(48, 24))

    pieces = {rows: exact.pieces((product,), rows) for rows in (4, 16, 25, 76, 90)}

    assert pieces == {4: (24,), 16: (24,), 25: (25,), 76: (32, 32, 24), 90: (32, 32, 26)}


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name not in ("add_times", "custom forward")])
def test_row_keeps_its_bits_in_padded_pieces(name, depends_on_rows, monkeypatch):
    monkeypatch.setattr(batch_invariant, "FILLED_ROWS", (20, 24, 28))
    rows, exact = drawn(100, 48), ExactProducts(BLOCK)
    whole = PRODUCTS[name](rows, exact)

    few = {number: PRODUCTS[name](rows[:number], exact) for number in range(1, 100, 7)}

    assert all(torch.equal(y, whole[:number]) for number, y in few.items())


def test_remainder_of_wide_pieces_is_split_separately(monkeypatch):
    monkeypatch.setattr(Product, "matches_blocks", lambda _, rows, *__: rows in (512, 60))
    exact, product = ExactProducts(256), product_of("mm", drawn(48, 24))

    pieces = {rows: exact.pieces((product,), rows) for rows in (512, 1023, 572, 800)}

    assert pieces == {512: (512,), 1023: (512, 256, 256), 572: (512, 60), 800: (512, 256, 256)}


def test_large_matrix_is_tried_with_at_most_one_block_of_rows(monkeypatch):
    monkeypatch.setattr(batch_invariant, "LARGE", 48 * 24 - 1)
    tried: list[int] = []
    monkeypatch.setattr(Product, "matches_blocks", lambda _, rows, *__: tried.append(rows) is None)
    exact = ExactProducts(BLOCK)

    pieces = {rows: exact.pieces((product_of("mm", drawn(48, 24)),), rows) for rows in (16, 28, 48, 90)}

    assert pieces == {16: (16,), 28: (28,), 48: (32, 16), 90: (32, 32, 26)}
    assert tried == [16, 28, 26]
    assert exact.pieces((product_of("mm", drawn(48, 23)),), 48) == (48,)


def test_matrix_whose_trial_needs_too_much_memory_is_never_tried(monkeypatch):
    monkeypatch.setattr(batch_invariant, "MOST_BYTES", 48 * 24 * 4 - 1)
    exact = ExactProducts(BLOCK)

    assert exact.pieces((product_of("mm", drawn(48, 24)),), 48) == (32, 32)
    assert exact.pieces((product_of("mm", drawn(48, 24).bfloat16()),), 48) == (48,)


@pytest.mark.parametrize(("rows", "columns"), [(3072, 8192), (49152, 576)])
def test_linears_of_a_3b_base_and_a_small_head_are_tried(monkeypatch, rows, columns):
    monkeypatch.setattr(Product, "matches_blocks", lambda *_: True)
    product = product_of("mm", torch.empty(rows, columns, dtype=torch.bfloat16))

    pieces = [ExactProducts().pieces((product,), number) for number in (32, 112, 272)]

    assert pieces == [(32,), (112,), (256, 16)]


def test_row_count_is_tried_once(monkeypatch):
    tried: list[int] = []
    monkeypatch.setattr(Product, "matches_blocks", lambda _, rows, *__: tried.append(rows) is None)
    exact = ExactProducts(BLOCK)

    for rows in (48, 80, 48, 80, 80):
        times(drawn(rows, 48), drawn(48, 24), exact)

    assert tried == [48, 80]


def test_custom_forward_can_be_differentiated(always_in_blocks):
    x = drawn(40, 48).requires_grad_()

    own_forward(OWN, x, 24, ExactProducts(BLOCK)).sum().backward()

    torch.testing.assert_close(x.grad, OWN.weight.sum(0).expand(40, 48))


class RowsOfFrozenProducts(TorchDispatchMode):
    """Counts the rows of each matmul by a base weight, forward and backward."""

    def __init__(self, base: BaseModel) -> None:
        super().__init__()
        self.rows: Counter[int] = Counter()
        self._weights = {weight.untyped_storage().data_ptr() for weight in base.model.parameters() if weight.ndim == 2}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_, aten.bmm):
            matrices = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim == 2]
            if any(matrix.untyped_storage().data_ptr() in self._weights for matrix in matrices):
                self.rows[len(matrices[-2])] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_matmuls_over_tokens_of_several_jobs_use_blocks(load, always_in_blocks, family):
    base = load(family)
    engine = Engine(base, EngineConfig(token_budget=512))
    shared = {**dict(list(submissions(family).items())[:4]), **preferences()}
    for name, job in shared.items():
        admit(engine, name, job)

    with RowsOfFrozenProducts(base) as seen:
        for _ in range(4):
            engine.tick()

    assert set(seen.rows) == {BLOCK}


@pytest.mark.slow_repetitions
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_equals_solo_in_blocks(load, always_in_blocks, family, dtype):
    base = load(family, dtype)
    jobs = dict(list(submissions(family).items())[:6])

    alone = {name: run_alone(base, job) for name, job in jobs.items()}
    packed = run_elastically(base, jobs, token_budget=512, seed=3, victim="none")

    assert {name: packed[name] == alone[name] for name in jobs} == dict.fromkeys(jobs, True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_equals_solo_with_a_kernel_that_depends_on_row_counts(load, depends_on_rows, monkeypatch, dtype):
    monkeypatch.setattr(patching, "ExactProducts", lambda: ExactProducts(BLOCK))
    base = load("llama", dtype)
    jobs = dict(list(submissions("llama").items())[:4])

    alone = {name: run_alone(base, job) for name, job in jobs.items()}
    packed = run_elastically(base, jobs, token_budget=512, seed=3, victim="none")

    assert {name: packed[name] == alone[name] for name in jobs} == dict.fromkeys(jobs, True)


def test_each_engine_chooses_whether_matmuls_are_batch_invariant(load):
    base = load("llama")

    Engine(base, EngineConfig(batch_invariant=False))
    fast = base.kernels.batch_invariant
    Engine(base, EngineConfig())

    assert fast is None
    assert base.kernels.batch_invariant is not None
