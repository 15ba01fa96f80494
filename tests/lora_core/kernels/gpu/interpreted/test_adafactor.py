"""The kernels take the Adafactor steps of several adapters like the optimizer of a CPU takes each."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from lora_core.adapter.flat_adapter import AdaptedModule, FlatAdapter
from lora_core.adapter.modules_to_save import TrainedTensor, TrainedTensors
from lora_core.adapter.optimizer import joint_step_of, optimizer_step
from lora_core.config import LoraConfig, OptimizerConfig
from lora_core.kernels.gpu.adafactor import adafactor, adafactor_launches
from lora_core.kernels.gpu.adafactor_table import CHUNK, AdafactorStep
from tests.lora_core.kernels.gpu.launches import recorded
from tests.lora_core.kernels.gpu.packs import numbers

SMALL = (
    AdaptedModule(name="a", in_features=144, out_features=16),
    AdaptedModule(name="b", in_features=21, out_features=9),
)
LARGE = (AdaptedModule(name="a", in_features=CHUNK + 44, out_features=200),)
HEAD = TrainedTensors(
    tensors=(
        TrainedTensor(name="head.weight", shape=(150, 132), start=lambda _seed: torch.zeros(150, 132)),
        TrainedTensor(name="head.bias", shape=(CHUNK + 5,), start=lambda _seed: torch.zeros(CHUNK + 5)),
    ),
    modules=("head",),
)


def of(**options: float | None) -> OptimizerConfig:
    return OptimizerConfig(**{"kind": "adafactor", "learning_rate": 0.05} | options)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """A step that is due: its adapter's seed, shapes and rank, its configuration, and its number."""

    seed: int
    rank: int
    targets: tuple[AdaptedModule, ...] = SMALL
    trained: TrainedTensors | None = None
    config: OptimizerConfig = field(default_factory=of)
    step: int = 1
    size: float = 1.0

    def adapter(self, dtype: torch.dtype = torch.bfloat16) -> FlatAdapter:
        lora = LoraConfig(rank=self.rank, alpha=1)
        adapter = FlatAdapter(
            self.targets, lora, dtype=dtype, device="cpu", trained=self.trained, optimizer="adafactor"
        )
        for index, vector in enumerate((adapter.p, adapter.g, adapter.v)):
            vector.copy_(numbers(self.seed + index, 1, vector.numel())[0])
        adapter.g.mul_(self.size)
        adapter.v.square_().mul_(0.1 * self.size**2)  # the next update is above the threshold
        if self.step == 1:
            adapter.v.zero_()
        return adapter

    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.adapter().g))

    def step_of(self, adapter: FlatAdapter) -> AdafactorStep:
        rate = self.config.learning_rate
        made = joint_step_of(adapter, self.config, step=self.step, learning_rate=rate, norm=self.norm())
        assert isinstance(made, AdafactorStep)
        return made


DUE = [
    Due(seed=1, rank=4, config=of(weight_decay=0.1)),
    Due(seed=2, rank=3, config=of(lora_plus_ratio=8.0, max_grad_norm=0.5, scale_floor=3.0), step=7),
    Due(seed=3, rank=20, targets=LARGE, trained=HEAD, config=of(max_grad_norm=None, clip_threshold=1.2), step=100),
    Due(seed=4, rank=4, config=of(beta2_decay=-0.5, learning_rate=0.9, max_grad_norm=None), step=2, size=1e15),
    Due(seed=5, rank=4, config=of(max_grad_norm=None), size=1e-15),
]


def stepped(due: list[Due], adapters: list[FlatAdapter]) -> list[FlatAdapter]:
    """Take all steps at once by the kernels."""
    adafactor([one.step_of(adapter) for one, adapter in zip(due, adapters, strict=True)])
    return adapters


def vectors(adapter: FlatAdapter) -> tuple[Tensor, ...]:
    return adapter.p, adapter.g, adapter.v, adapter.compute


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_those_of_a_cpu(dtype: torch.dtype) -> None:
    found = stepped(DUE, [one.adapter(dtype) for one in DUE])

    for one, adapter in zip(DUE, found, strict=True):
        expected = one.adapter(dtype)
        before = expected.p.clone()
        optimizer_step(expected, one.config, step=one.step, learning_rate=one.config.learning_rate, norm=one.norm())
        assert not torch.equal(before, expected.p)
        torch.testing.assert_close(adapter.p, expected.p, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(adapter.v, expected.v, rtol=1e-5, atol=0)
        torch.testing.assert_close(adapter.compute, expected.compute, rtol=8e-3, atol=1e-6)
        assert not adapter.g.any()


def test_step_together_has_the_bits_of_a_step_alone() -> None:
    together = stepped(DUE, [one.adapter() for one in DUE])

    for one, adapter in zip(DUE, together, strict=True):
        (alone,) = stepped([one], [one.adapter()])
        assert all(map(torch.equal, vectors(alone), vectors(adapter)))


def test_matrix_has_the_same_bits_in_adapters_with_other_matrices() -> None:
    unclipped = of(max_grad_norm=None)
    alone = Due(seed=1, rank=4, targets=SMALL[1:], config=unclipped)
    beside = Due(seed=2, rank=4, trained=HEAD, config=unclipped)
    expected, found, start = alone.adapter(), beside.adapter(), alone.adapter()
    places = [(own, other) for own in expected.blocks for other in found.blocks if own.shape == other.shape]
    assert len(places) == 2
    for own, other in places:
        found.p[other.numbers], found.g[other.numbers] = start.p[own.numbers], start.g[own.numbers]

    stepped([alone], [expected])
    stepped([beside], [found])

    assert not torch.equal(expected.p, start.p)
    for own, other in places:
        assert torch.equal(found.p[other.numbers], expected.p[own.numbers])
        assert torch.equal(found.v[other.memory], expected.v[own.memory])


def test_steps_of_other_adapters_need_no_other_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = recorded(monkeypatch)

    for due in (DUE[:1], DUE[:1] * 4):  # tiles of the second kind start at 1 and at 4
        stepped(due, [one.adapter() for one in due])

    properties = {launch.variant: launch.properties for launch in launches}
    assert all(launch.properties == properties[launch.variant] for launch in launches)


def test_launches_depend_on_the_kinds_of_matrices_alone() -> None:
    few, many = (len(adafactor_launches([one.step_of(one.adapter()) for one in due])) for due in (DUE[:1], DUE[:1] * 9))

    assert few == many <= 15
    aligned = Due(seed=1, rank=4, targets=LARGE)
    assert len(adafactor_launches([aligned.step_of(aligned.adapter())])) == 9
