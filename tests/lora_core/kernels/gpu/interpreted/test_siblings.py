"""Linears with the same input share their launches, with the bits of launches of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_core.adapter.flat_adapter import AdaptedModule, FlatAdapter
from lora_core.config import LoraConfig
from lora_core.layers.fused_projections import PackedSiblings, shares_of
from lora_core.layers.lora_linear import PackedLinear, PlainWeight
from lora_core.layers.tiled_lora import SegmentedLora
from lora_core.packing.packed_batch import DropoutKey, SliceInput, build_pack
from tests.lora_core.kernels.gpu.packs import numbers

D = 96
OUTPUTS = {"q_proj": 80, "k_proj": 48, "v_proj": 144}
MODULES = tuple(OUTPUTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job with one slice. Its numbers depend on `seed` alone."""

    seed: int
    num_tokens: int
    lora: LoraConfig
    dropout: float = 0.0
    targets: tuple[str, ...] = MODULES

    def slice_input(self) -> SliceInput:
        targets = tuple(AdaptedModule(name=name, in_features=D, out_features=OUTPUTS[name]) for name in self.targets)
        frozen = {name: numbers(1, OUTPUTS[name], D) for name in self.targets}
        adapter = FlatAdapter(targets, self.lora, dtype=torch.float32, device="cpu", frozen=frozen)
        adapter.p[:] = numbers(self.seed, adapter.num_parameters, 1)[:, 0]
        adapter.refresh_compute()
        key = DropoutKey(probability=self.dropout, seed=self.seed, step=3, slice_index=1) if self.dropout else None
        tokens = np.zeros(self.num_tokens, np.int32), np.zeros(self.num_tokens, np.uint8)
        return SliceInput(adapter=adapter, sequences=(tokens,), label_weight=0.0, dropout=key)


JOBS = [
    Job(seed=10, num_tokens=70, lora=LoraConfig(rank=16, alpha=8)),
    Job(seed=20, num_tokens=5, lora=LoraConfig(rank=40, alpha=8, rank_pattern=(("k_proj", 4), ("v_proj", 24)))),
    Job(seed=30, num_tokens=33, lora=LoraConfig(rank=8, alpha=8), dropout=0.5, targets=("q_proj", "v_proj")),
    Job(seed=40, num_tokens=9, lora=LoraConfig(rank=8, alpha=8, use_dora=True), targets=("k_proj",)),
    Job(seed=50, num_tokens=65, lora=LoraConfig(rank=4, alpha=8, rank_pattern=(("q_proj", 20),)), dropout=0.1),
]
"""Three have linears of several classes or without an adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Rows of each y and of dx that belong to one job, and its gradient vector."""

    outputs: tuple[Tensor, ...]
    dx_tD: Tensor
    gradient_N: Tensor


def computed(
    jobs: list[Job], how: Literal["together", "separately", "loop"], *, with_base: bool = True
) -> list[Results]:
    slices = [job.slice_input() for job in jobs]
    pack = build_pack(slices, device="cpu")
    T = pack.input_ids.shape[1]
    x_TD, gradients = torch.zeros(T, D), [torch.zeros(T, size) for size in OUTPUTS.values()]
    spans = [slice(segment.start, segment.stop) for segment in pack.segments]
    for job, rows in zip(jobs, spans, strict=True):
        x_TD[rows] = numbers(job.seed + 1, job.num_tokens, D)
        for index, dy_TO in enumerate(gradients):
            dy_TO[rows] = numbers(job.seed + 2 + index, job.num_tokens, dy_TO.shape[1])
    x_TD.requires_grad_()
    leaf, cpu = torch.zeros((), requires_grad=True), torch.device("cpu")
    scale = 1.0 if with_base else 0.0
    weights = [PlainWeight(weight_OD=scale * numbers(1, size, D), bias_O=None) for size in OUTPUTS.values()]
    op = SegmentedLora("loop" if how == "loop" else "tiled", MODULES, [MODULES])
    if how == "together":
        outputs = PackedSiblings.apply(x_TD, leaf, tuple(weights), shares_of(pack, MODULES, op, cpu))
    else:
        shares = [op.divide((module,), pack, cpu) for module in MODULES]
        outputs = tuple(
            PackedLinear.apply(x_TD, leaf, weight, *share.pieces, share.runs)
            for weight, share in zip(weights, shares, strict=True)
        )
    torch.autograd.backward(outputs, gradients)
    assert x_TD.grad is not None
    return [
        Results(
            outputs=tuple(y_TO.detach()[rows] for y_TO in outputs),
            dx_tD=x_TD.grad[rows],
            gradient_N=part.adapter.g,
        )
        for rows, part in zip(spans, slices, strict=True)
    ]


def test_siblings_give_the_output_and_gradients_of_the_loop() -> None:
    for found, expected in zip(computed(JOBS, "together"), computed(JOBS, "loop"), strict=True):
        pairs = [*zip(found.outputs, expected.outputs, strict=True), (found.dx_tD, expected.dx_tD)]
        for ours, reference in [*pairs, (found.gradient_N, expected.gradient_N)]:
            assert float((ours - reference).abs().max() / reference.abs().max()) < 2e-6


def test_shared_launches_give_the_bits_of_separate_ones() -> None:
    for found, expected in zip(computed(JOBS, "together"), computed(JOBS, "separately"), strict=True):
        assert all(map(torch.equal, found.outputs, expected.outputs))
        assert torch.equal(found.gradient_N, expected.gradient_N)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_siblings_have_the_bits_of_siblings_alone(reverse: bool) -> None:
    jobs = JOBS[::-1] if reverse else JOBS
    packed = computed(jobs, "together", with_base=False)

    for job, found in zip(jobs, packed, strict=True):
        (alone,) = computed([job], "together", with_base=False)
        assert all(map(torch.equal, found.outputs, alone.outputs))
        assert torch.equal(found.dx_tD, alone.dx_tD)
        assert torch.equal(found.gradient_N, alone.gradient_N)
