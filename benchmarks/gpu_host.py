"""Host time of LoRA on a GPU for each linear layer and tick, measured on a CPU.

For each pass on a GPU, the host plans tables of all segments, and launches Triton kernels for each linear layer. The
same Python runs here with kernels that do nothing, for all layers in the order of a tick. Between the timed calls, only
the outputs of the base model's linear layers are allocated. A second measurement computes these with matmuls, which
evict the caches of the CPU. Triton's own launch and the copy of the tables to the device are not included: they need a
GPU, where benchmarks.gpu.kit measures them.

Shape suffixes: T tokens of the pack, D input features, O output features, W padded rank.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gate import Contender, Gate, Json
from benchmarks.plan import Plan
from benchmarks.results import Result
from lora_core.adapter.flat_adapter import AdaptedModule, FlatAdapter
from lora_core.base_model.model import load_base
from lora_core.base_model.patching import Attachment, choose_targets
from lora_core.config import LoraConfig
from lora_core.kernels.selection import Kernels
from lora_core.layers.tiled_lora import SiteShare
from lora_core.module_paths import layer_of
from lora_core.packing.packed_batch import PackedBatch, SliceInput, build_pack

GOAL_MICROSECONDS = 25
PARTS = {
    "plan": "Plan of a pass",
    "forward": "Launches of the forward pass",
    "backward": "Launches of the backward pass",
}
PLANNED_TOKENS = 512
"""Tokens of each job in the plan of a pass. The tables grow with them. Launches are measured with one token of each."""
TICKS_PER_MATMUL_TICK = 30


def run(plan: Plan) -> Result:
    sizes = {"jobs": plan.host_tick_jobs, "ticks": plan.host_ticks}
    model = {"model": plan.workload.model, "rank": plan.rank, "targets": "all-linear"}
    result = Result(theme="gpu_host", settings=model | sizes | {"kernels": "do nothing", "repeats": plan.repeats})
    options: dict[str, Any] = sizes | {"base": str(plan.workload.base), "rank": plan.rank}
    with closing(Contender("gpu_host", threads=1, log=plan.folder / "gpu_host.log", **options)) as contender:
        for name, matmuls in (("allocations", False), ("matmuls", True)):
            result.repeats[name] = [contender.step(matmuls=matmuls) for _ in range(plan.repeats)]
    shortest = {name: min(map(_parts, reports), key=sum) for name, reports in result.repeats.items()}
    for title, microseconds in zip(PARTS.values(), shortest["allocations"], strict=True):
        result.find(f"{title}, per linear layer", microseconds, "µs")
    total = "Host time per linear layer and tick"
    result.find(total, sum(shortest["allocations"]), "µs", at_most=GOAL_MICROSECONDS)
    result.find(f"{total}, caches evicted by matmuls", sum(shortest["matmuls"]), "µs")
    return result


def _parts(report: Json) -> list[float]:
    return [report[part] for part in PARTS]


def gpu_host(gate: Gate, options: dict[str, Any]) -> None:
    """Report the parts of the shortest of many ticks, in µs per linear layer of the base model."""
    base = load_base(options["base"], dtype="bfloat16", device="cpu")
    attachment = Attachment(base.model, Kernels(lora="tiled"))
    _replace_triton()
    host = _Host(attachment, num_jobs=options["jobs"], rank=options["rank"])
    while True:
        matmuls = gate.wait()["matmuls"]
        num_ticks = max(2, options["ticks"] // (TICKS_PER_MATMUL_TICK if matmuls else 1))
        seconds = min((host.tick(matmuls=matmuls) for _ in range(num_ticks)), key=sum)
        gate.report(**{part: 1e6 * each / len(attachment.linears) for part, each in zip(PARTS, seconds, strict=True)})


class _Host:
    """Plans and launches the LoRA of a pack in all linear layers of an attached base model.

    All blocks share the inputs and weights of one.
    """

    def __init__(self, attachment: Attachment, *, num_jobs: int, rank: int) -> None:
        lora = LoraConfig(rank=rank, alpha=2 * rank)
        targets = choose_targets(attachment.linears, lora)
        self._lora = attachment.segment_op
        self._planned, self._launched = (_pack(targets, lora, num_jobs, length) for length in (PLANNED_TOKENS, 1))
        num_tokens = self._launched.input_ids.shape[1]
        linears = {linear.name: linear for linear in targets}
        block = [[linears[name] for name in group] for group in self._lora.groups if layer_of(group[0]) == 0]
        self._inputs = [torch.randn(num_tokens, of_group[0].in_features) for of_group in block]
        self._weights = [[torch.randn(one.out_features, one.in_features) for one in of_group] for of_group in block]

    def tick(self, *, matmuls: bool) -> tuple[float, float, float]:
        """Return the seconds of the plan, and of all launches of the forward and the backward pass."""
        forward = backward = 0.0
        begin = time.perf_counter()
        self._lora.plan(self._planned.segments, torch.device("cpu"))
        plan = time.perf_counter() - begin
        self._launched.plans.clear()
        # A new plan, outside the timed parts. Its launches are prepared within them, as in each pass on a GPU.
        self._lora.divide(self._lora.groups[0], self._launched, torch.device("cpu"))
        saved: list[tuple[int, SiteShare, list[Tensor], list[Tensor]]] = []
        for index, group in enumerate(self._lora.groups):
            x_TD, outputs = self._forward(index, matmuls=matmuls)
            begin = time.perf_counter()
            share = self._lora.divide(group, self._launched, x_TD.device)
            hidden = [run.add(outputs, x_TD) for run in share.runs]
            forward += time.perf_counter() - begin
            saved.append((index, share, outputs, hidden))
        for index, share, gradients, hidden in reversed(saved):
            x_TD, dx_TD = self._backward(index, gradients, matmuls=matmuls)
            begin = time.perf_counter()
            for run, h_TW in zip(share.runs, hidden, strict=True):
                run.add_gradients(dx_TD, gradients, x_TD, h_TW)
            backward += time.perf_counter() - begin
        return plan, forward, backward

    def _forward(self, index: int, *, matmuls: bool) -> tuple[Tensor, list[Tensor]]:
        """Return the input and the outputs of a group."""
        x_TD, weights = self._of_group(index)
        if matmuls:
            return x_TD, [x_TD @ weight_OD.T for weight_OD in weights]
        return x_TD, [x_TD.new_empty(len(x_TD), len(weight_OD)) for weight_OD in weights]

    def _backward(self, index: int, gradients: list[Tensor], *, matmuls: bool) -> tuple[Tensor, Tensor]:
        """Return the input of a group and its gradient."""
        x_TD, weights = self._of_group(index)
        dx_TD = torch.empty_like(x_TD)
        if matmuls:
            dx_TD.zero_()
            for dy_TO, weight_OD in zip(gradients, weights, strict=True):
                dx_TD.addmm_(dy_TO, weight_OD)
        return x_TD, dx_TD

    def _of_group(self, index: int) -> tuple[Tensor, list[Tensor]]:
        return self._inputs[index % len(self._inputs)], self._weights[index % len(self._weights)]


def _pack(targets: tuple[AdaptedModule, ...], lora: LoraConfig, num_jobs: int, length: int) -> PackedBatch:
    """Return a pack of one sequence of each job."""
    ids, mask = np.zeros(length, np.int32), np.ones(length, np.uint8)
    slices = [
        SliceInput(
            adapter=FlatAdapter(targets, lora, dtype=torch.bfloat16, device="cpu"),
            sequences=((ids, mask),),
            label_weight=1.0,
            dropout=None,
        )
        for _ in range(num_jobs)
    ]
    return build_pack(slices, device="cpu")


class _Kernel:
    """A kernel that ignores its launches."""

    def __init__(self, _function: object = None, **_options: object) -> None:
        pass

    def __call__(self, _function: object) -> _Kernel:
        return self

    def __getitem__(self, _grid: tuple[int, ...]) -> Any:
        return _launch_nothing


def _launch_nothing(*_: object, **__: object) -> None:
    pass


def _replace_triton() -> None:
    """Replace Triton in this process, whether it is installed or not."""
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    vars(triton).update(jit=_Kernel, language=language)
    vars(language).update(constexpr=lambda value: value)
    sys.modules.update({"triton": triton, "triton.language": language})
