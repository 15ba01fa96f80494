"""Products in blocks of rows: the numbers of whole ones, and no row's bits depend on how many others there are."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core import attach, row_blocks
from lora_core.base_model import BaseModel
from lora_core.engine import Engine
from lora_core.engine_config import EngineConfig
from lora_core.row_blocks import add_times, both_ways, forward_in_blocks, linear, needed_row_block, times
from tests.lora_core.scenarios import admit, preferences, run_alone, run_elastically, submissions

BLOCK = 32
aten = torch.ops.aten


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: linear(x, drawn(24, 48, seed=1), None, BLOCK),
    "linear with bias": lambda x: linear(x, drawn(24, 48, seed=1), drawn(24, seed=2), BLOCK),
    "times": lambda x: times(x, drawn(48, 24, seed=1), BLOCK),
    "add_times": lambda x: add_times(drawn(len(x), 24, seed=3), x, drawn(48, 24, seed=1), BLOCK),
    "a forward of its own": lambda x: forward_in_blocks(lambda part: part @ drawn(48, 24, seed=1), x, BLOCK),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 96, 100])
def test_blocks_give_the_numbers_of_a_whole_product(name, rows, monkeypatch):
    x = drawn(rows, 48)

    in_blocks = PRODUCTS[name](x)

    monkeypatch.setattr(row_blocks, "_in_blocks", lambda x, y, _, compute: compute(x, y))
    torch.testing.assert_close(in_blocks, PRODUCTS[name](x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name != "add_times"])
def test_every_product_has_the_same_number_of_rows_and_a_row_keeps_its_bits_anywhere(name):
    rows = drawn(100, 48)
    whole = PRODUCTS[name](rows)

    order = torch.randperm(100, generator=torch.Generator().manual_seed(4))

    assert torch.equal(PRODUCTS[name](rows[order]), whole[order])
    assert torch.equal(PRODUCTS[name](rows[7:12]), whole[7:12])


def test_a_forward_in_blocks_can_be_differentiated():
    x = drawn(40, 48).requires_grad_()
    weight = drawn(48, 24, seed=1)

    forward_in_blocks(lambda part: part @ weight, x, BLOCK).sum().backward()

    torch.testing.assert_close(x.grad, weight.sum(1).expand(40, 48))


def test_blocks_are_needed_where_the_sum_of_a_row_depends_on_the_number_of_rows():
    weight = drawn(64, 64)

    assert needed_row_block(both_ways(weight), torch.float32) is None
    assert needed_row_block([*both_ways(weight), (by_number, 64)], torch.float32) == row_blocks.ROW_BLOCK


def by_number(x: Tensor) -> Tensor:
    return x + (1e-6 if len(x) < 48 else 0)


class RowsOfFrozenProducts(TorchDispatchMode):
    """How many rows each product by one of the base's weights has, forward and backward."""

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
def test_no_product_over_tokens_of_several_jobs_has_another_number_of_rows(load, monkeypatch, family):
    monkeypatch.setattr(attach, "needed_row_block", lambda *_: BLOCK)
    base = load(family)
    engine = Engine(base, EngineConfig(token_budget=512))
    shared = {**dict(list(submissions(family).items())[:4]), **preferences()}
    for name, job in shared.items():
        admit(engine, name, job)

    with RowsOfFrozenProducts(base) as seen:
        for _ in range(4):
            engine.tick()

    assert set(seen.rows) == {BLOCK}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_equals_solo_in_blocks(load, monkeypatch, family, dtype):
    monkeypatch.setattr(attach, "needed_row_block", lambda *_: BLOCK)
    base = load(family, dtype)
    jobs = dict(list(submissions(family).items())[:6])

    alone = {name: run_alone(base, job) for name, job in jobs.items()}
    packed = run_elastically(base, jobs, token_budget=512, seed=3, victim="none")

    assert base.kernels.row_block == BLOCK
    assert {name: packed[name] == alone[name] for name in jobs} == dict.fromkeys(jobs, True)


def test_whoever_wants_speed_gets_products_as_they_are_and_another_engine_its_own(load, monkeypatch):
    monkeypatch.setattr(attach, "needed_row_block", lambda *_: BLOCK)
    base = load("llama")

    Engine(base, EngineConfig(exact_products=False))
    fast = base.kernels.row_block
    Engine(base, EngineConfig())

    assert (fast, base.kernels.row_block) == (None, BLOCK)
