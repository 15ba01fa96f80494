"""How often the kernels of tiled LoRA load and store inputs, outputs, gradients and weights: what limits their speed.

The counts are those of the programs. A cache of the device may serve some of them.

Shape suffixes: T tokens, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_core.adapter.flat_adapter import AdaptedModule, FlatAdapter
from lora_core.config import LoraConfig
from lora_core.kernels.gpu.tables import TILE_ROWS, WIDTHS
from lora_core.layers.tiled_lora import SegmentedLora
from lora_core.packing.packed_batch import DropoutKey, SliceInput, build_pack
from tests.lora_core.kernels.gpu.memory_passes import Accesses, MemoryPasses, counted_passes
from tests.lora_core.kernels.gpu.packs import numbers

D = 208
OUTPUTS = {"q_proj": 144, "k_proj": 80, "v_proj": 336}
LINEAR, SIBLINGS = ("q_proj",), tuple(OUTPUTS)
ADDED_COLUMNS = {16: 128, 32: 128, 64: 64, 128: 64}
"""Features of a tile of y or dx by the padded rank. A program for each tile reads h or dh."""
GRADIENT_COLUMNS = 64
"""Features of a tile of dA or dB. A program for each tile reads dh or h."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job with one slice, and the ranks of the linears that it adapts."""

    num_tokens: int
    ranks: Mapping[str, int]
    dropout: float = 0.0

    def ranks_in(self, modules: tuple[str, ...]) -> dict[str, int]:
        return {module: self.ranks[module] for module in modules if module in self.ranks}

    def num_variants(self, modules: tuple[str, ...]) -> int:
        """Return the number of variants of the kernels, each of which has launches of its own."""
        return len({(padded(rank), rank % 8 == 0) for rank in self.ranks_in(modules).values()})

    def slice_input(self, modules: tuple[str, ...]) -> SliceInput:
        ranks = self.ranks_in(modules)
        targets = tuple(AdaptedModule(name=name, in_features=D, out_features=OUTPUTS[name]) for name in ranks)
        lora = LoraConfig(rank=8, alpha=8, rank_pattern=tuple(ranks.items()))
        adapter = FlatAdapter(targets, lora, dtype=torch.float32, device="cpu")
        key = DropoutKey(probability=self.dropout, seed=2, step=3, slice_index=1) if self.dropout else None
        tokens = np.zeros(self.num_tokens, np.int32), np.zeros(self.num_tokens, np.uint8)
        return SliceInput(adapter=adapter, sequences=(tokens,), label_weight=0.0, dropout=key)


JOBS = (
    Job(num_tokens=70, ranks=dict.fromkeys(SIBLINGS, 16)),  # more than one tile
    Job(num_tokens=7, ranks={"k_proj": 8}),  # the single linear has no adapter
    Job(num_tokens=130, ranks={"q_proj": 24, "k_proj": 4, "v_proj": 20}, dropout=0.1),  # three variants
    Job(num_tokens=33, ranks={"q_proj": 40, "v_proj": 48}),
    Job(num_tokens=65, ranks=dict.fromkeys(SIBLINGS, 12), dropout=0.5),
    Job(num_tokens=9, ranks={"q_proj": 100, "v_proj": 8}),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The passes of all jobs in linears with one input, forward and backward, and the rows of each job."""

    forward: MemoryPasses
    backward: MemoryPasses
    rows: tuple[slice, ...]
    hidden: tuple[str, ...]


@cache
def measured(modules: tuple[str, ...]) -> Measured:
    slices = [job.slice_input(modules) for job in JOBS]
    pack = build_pack(slices, device="cpu")
    T = pack.input_ids.shape[1]
    x_TD, dx_TD = numbers(1, T, D), torch.zeros(T, D)
    outputs = [torch.zeros(T, OUTPUTS[module]) for module in modules]
    gradients = [numbers(2, T, OUTPUTS[module]) for module in modules]
    tensors: dict[str, Tensor] = {"x": x_TD, "dx": dx_TD}
    for module, y_TO, dy_TO in zip(modules, outputs, gradients, strict=True):
        tensors |= {f"y {module}": y_TO, f"dy {module}": dy_TO}
    for index, part in enumerate(slices):
        for module, views in part.adapter.sites.items():
            named = {"A": views.a_RD, "B": views.b_OR, "dA": views.grad_a_RD, "dB": views.grad_b_OR}
            tensors |= {f"{name} {module} {index}": tensor for name, tensor in named.items()}
    share = SegmentedLora("tiled", modules, [modules]).divide(modules, pack, torch.device("cpu"))
    assert not any(share.pieces), "the loop computes a segment"
    with counted_passes(tensors) as forward:
        hidden = [run.add(outputs, x_TD) for run in share.runs]
    of_runs = {f"h {index}": h_tW for index, h_tW in enumerate(hidden)}
    with counted_passes(tensors | of_runs) as backward:
        for run, h_tW in zip(share.runs, hidden, strict=True):
            run.add_gradients(dx_TD, gradients, x_TD, h_tW)
    rows = tuple(slice(segment.start, segment.stop) for segment in pack.segments)
    return Measured(forward=forward, backward=backward, rows=rows, hidden=tuple(of_runs))


def padded(rank: int) -> int:
    return next(width for width in WIDTHS if rank <= width)


def accessed(accesses: Accesses, modules: tuple[str, ...], index: int, rows: slice) -> dict[str, list[int]]:
    """Return how often the job's rows and weights were accessed: one number if all elements were equally often.

    Leaves out what was not accessed.
    """
    by_row = ["x", "dx", *(f"{name} {module}" for name in ("y", "dy") for module in modules)]
    found = {name: accesses[name][rows] for name in by_row}
    for module in JOBS[index].ranks_in(modules):
        found |= {f"{name} {module}": accesses[f"{name} {module} {index}"] for name in ("A", "B", "dA", "dB")}
    return {name: np.unique(times).tolist() for name, times in found.items() if times.any()}


def each(modules: Iterable[str], **times: int) -> dict[str, list[int]]:
    """Return an expected number of accesses to tensors of each linear."""
    return {f"{name} {module}": [number] for module in modules for name, number in times.items()}


def total(accesses: Accesses, modules: tuple[str, ...], rows: slice) -> int:
    """Return the accesses to the rows of inputs, outputs and their gradients."""
    names = ["x", "dx", *(f"{name} {module}" for name in ("y", "dy") for module in modules)]
    return sum(int(accesses[name][rows].sum()) for name in names)


@pytest.mark.parametrize("modules", [LINEAR, SIBLINGS])
def test_forward_reads_the_input_once_for_each_linear_and_updates_outputs_once(modules: tuple[str, ...]) -> None:
    found = measured(modules)

    for index, (job, rows) in enumerate(zip(JOBS, found.rows, strict=True)):
        adapted, tiles = job.ranks_in(modules), ceil(job.num_tokens / TILE_ROWS)
        x = {"x": [len(adapted)]} if adapted else {}
        assert accessed(found.forward.loads, modules, index, rows) == x | each(adapted, y=1, A=tiles, B=tiles)
        assert accessed(found.forward.stores, modules, index, rows) == each(adapted, y=1)


@pytest.mark.parametrize("modules", [LINEAR, SIBLINGS])
def test_backward_reads_output_gradients_twice_and_updates_others_once(modules: tuple[str, ...]) -> None:
    """dh sums dy over features, and dB sums it over tokens. So two programs read an element of dy."""
    found = measured(modules)

    for index, (job, rows) in enumerate(zip(JOBS, found.rows, strict=True)):
        adapted, tiles = job.ranks_in(modules), ceil(job.num_tokens / TILE_ROWS)
        x = {"x": [len(adapted)]} if adapted else {}
        dx = {"dx": [job.num_variants(modules)]} if adapted else {}
        expected_loads = x | dx | each(adapted, dy=2, A=tiles, B=tiles, dA=1, dB=1)
        assert accessed(found.backward.loads, modules, index, rows) == expected_loads
        assert accessed(found.backward.stores, modules, index, rows) == dx | each(adapted, dA=1, dB=1)


@pytest.mark.parametrize("modules", [LINEAR, SIBLINGS])
def test_low_rank_products_are_written_once_and_read_for_each_tile_of_features(modules: tuple[str, ...]) -> None:
    found = measured(modules)

    written = added = from_h = from_dh = 0
    for job in JOBS:
        for module, rank in job.ranks_in(modules).items():
            size, columns = job.num_tokens * padded(rank), ADDED_COLUMNS[padded(rank)]
            written += size
            added += size * ceil(OUTPUTS[module] / columns)
            from_h += size * ceil(OUTPUTS[module] / GRADIENT_COLUMNS)
            from_dh += size * (ceil(D / columns) + ceil(D / GRADIENT_COLUMNS))
    forward, backward = found.forward, found.backward
    assert (forward.loads.others, forward.stores.others) == (added, written)
    assert sum(int(backward.loads[name].sum()) for name in found.hidden) == from_h
    assert not any(backward.stores[name].any() for name in found.hidden)
    assert (backward.loads.others, backward.stores.others) == (from_dh, written)


@pytest.mark.parametrize("modules", [LINEAR, SIBLINGS])
def test_rows_of_no_job_are_not_accessed(modules: tuple[str, ...]) -> None:
    found = measured(modules)

    rows = slice(found.rows[-1].stop, None)
    assert found.forward.loads["x"][rows].size > 0
    for passes in (found.forward, found.backward):
        assert total(passes.loads, modules, rows) == total(passes.stores, modules, rows) == 0


def test_a_linear_accesses_four_times_as_many_elements_as_input_and_output_have() -> None:
    found, outputs = measured(LINEAR), OUTPUTS[LINEAR[0]]

    for job, rows in zip(JOBS, found.rows, strict=True):
        forward, backward = (
            (total(passes.loads, LINEAR, rows) + total(passes.stores, LINEAR, rows)) / job.num_tokens
            for passes in (found.forward, found.backward)
        )
        is_adapted = bool(job.ranks_in(LINEAR))
        assert forward == is_adapted * (D + 2 * outputs)
        assert backward == is_adapted * (3 * D + 2 * outputs)
