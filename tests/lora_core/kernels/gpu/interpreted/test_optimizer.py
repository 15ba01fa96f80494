"""The optimizer kernels take the steps of several adapters like the optimizer of a CPU takes each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_core.adapter.flat_adapter import AdaptedModule, FlatAdapter
from lora_core.adapter.optimizer import joint_step_of, optimizer_step
from lora_core.config import LoraConfig, OptimizerConfig
from lora_core.kernels.gpu.optimizer import adamw, step_sizes
from lora_core.kernels.gpu.optimizer_table import WORD, AdamwStep
from tests.lora_core.kernels.gpu.launches import recorded
from tests.lora_core.kernels.gpu.packs import numbers

TARGETS = (
    AdaptedModule(name="a", in_features=48, out_features=16),
    AdaptedModule(name="b", in_features=21, out_features=9),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """A step that is due: its adapter's seed and rank, its configuration, and its number."""

    seed: int
    rank: int
    config: OptimizerConfig
    step: int

    def adapter(self, dtype: torch.dtype = torch.bfloat16) -> FlatAdapter:
        adapter = FlatAdapter(TARGETS, LoraConfig(rank=self.rank, alpha=1), dtype=dtype, device="cpu")
        for index, vector in enumerate((adapter.p, adapter.g, adapter.m, adapter.v)):
            vector.copy_(numbers(self.seed + index, 1, adapter.num_parameters)[0])
        adapter.v.abs_()
        return adapter

    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.adapter().g))


DUE = [
    Due(seed=1, rank=4, config=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1), step=1),
    Due(seed=2, rank=3, config=OptimizerConfig(learning_rate=1e-3, lora_plus_ratio=8.0, max_grad_norm=0.5), step=7),
    Due(seed=3, rank=64, config=OptimizerConfig(learning_rate=1e-2, max_grad_norm=None, beta2=0.99), step=100),
]


def step_of(
    adapter: FlatAdapter, config: OptimizerConfig, *, step: int, learning_rate: float, norm: float
) -> AdamwStep:
    return joint_step_of(adapter, config, step=step, learning_rate=learning_rate, norm=norm)


def stepped(due: list[Due], adapters: list[FlatAdapter]) -> list[FlatAdapter]:
    """Take all steps at once by the kernel."""
    adamw(
        [
            step_of(adapter, one.config, step=one.step, learning_rate=one.config.learning_rate, norm=one.norm())
            for one, adapter in zip(due, adapters, strict=True)
        ]
    )
    return adapters


def vectors(adapter: FlatAdapter) -> tuple[Tensor, ...]:
    return adapter.p, adapter.g, adapter.m, adapter.v, adapter.compute


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_those_of_a_cpu(dtype: torch.dtype) -> None:
    found = stepped(DUE, [one.adapter(dtype) for one in DUE])

    for one, adapter in zip(DUE, found, strict=True):
        expected = one.adapter(dtype)
        rate, norm = one.config.learning_rate, one.norm()
        optimizer_step(expected, one.config, step=one.step, learning_rate=rate, norm=norm)
        for ours, reference in zip(vectors(adapter), vectors(expected), strict=True):
            tolerance = 1e-5 if ours.dtype == torch.float32 else 8e-3  # the interpreter rounds to bf16 toward zero
            torch.testing.assert_close(ours, reference, rtol=tolerance, atol=1e-6)
        assert not adapter.g.any()


def test_step_rounds_each_operation() -> None:
    one, single = DUE[0], np.float32
    found, start = one.adapter(), one.adapter()
    entry = step_of(found, one.config, step=1, learning_rate=1e-2, norm=one.norm()).entry()
    word = {name: single(entry[index]) for name, index in WORD.items()}
    p, g, m, v = (vector.numpy() for vector in vectors(start)[:4])

    adamw([step_of(found, one.config, step=1, learning_rate=1e-2, norm=one.norm())])

    g = g * word["clip"]
    m = m + word["newest_m"] * (g - m)
    v = v * word["kept_v"] + word["newest_v"] * g * g
    p = p * word["decay"] - word["rate"] * (m / (np.sqrt(v) / word["root"] + word["eps"]))
    for ours, expected in zip(vectors(found), (p, np.zeros_like(g), m, v), strict=False):
        assert np.array_equal(ours.numpy(), expected)


def test_step_together_has_the_bits_of_a_step_alone() -> None:
    together = stepped(DUE, [one.adapter() for one in DUE])

    for one, adapter in zip(DUE, together, strict=True):
        (alone,) = stepped([one], [one.adapter()])
        assert all(map(torch.equal, vectors(alone), vectors(adapter)))


def test_sizes_are_those_of_each_adapter_and_do_not_depend_on_others() -> None:
    adapters = [one.adapter() for one in DUE]
    groups = [(adapter.g, adapter.p, adapter.m) for adapter in adapters]
    long = torch.full((20_000,), 2.0), torch.arange(20_000.0), torch.ones(20_000)

    sizes = step_sizes([*groups, long])

    for row, (g, p, m) in zip(sizes, [*groups, long], strict=True):
        expected = torch.stack([torch.linalg.vector_norm(g), p.abs().max(), m.abs().max()])
        torch.testing.assert_close(row, expected)
        assert torch.equal(step_sizes([(g, p, m)])[0], row)


def test_steps_of_other_adapters_need_no_other_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = recorded(monkeypatch)

    for due in (DUE[:1], DUE, DUE[1:]):
        adapters = [one.adapter() for one in due]
        step_sizes([(adapter.g, adapter.p, adapter.m) for adapter in adapters])
        stepped(due, adapters)
    step_sizes([(torch.ones(150_000), torch.ones(150_000), torch.ones(150_000))])  # 19 blocks, and 1 before

    assert {launch.kernel for launch in launches} == {"_adamw", "_partial_sizes", "_whole_sizes"}
    properties = {launch.variant: launch.properties for launch in launches}
    assert len(properties) == 5
    assert all(launch.properties == properties[launch.variant] for launch in launches)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("vector", [0, 1, 2])
def test_size_is_not_finite_if_an_element_is_not(number: float, vector: int) -> None:
    parts = torch.ones(3, 9000)
    parts[vector, 8500] = number
    other = torch.ones(100)

    sizes = step_sizes([(parts[0], parts[1], parts[2]), (other, other, other)])

    assert [math.isfinite(size) for size in sizes[0].tolist()] == [index != vector for index in range(3)]
    assert sizes[1].tolist() == [10.0, 1.0, 1.0]
