"""Comparisons on one base model: steady state against PEFT, kernels against each other, and ticks of growing size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.contenders import Lorry, Matrix, Peft, Report
from benchmarks.gpu.load import Load
from benchmarks.gpu.shapes import Shape, block_weights, build
from benchmarks.results import Result, median_of, median_ratio, rates
from lora_core.base_model.model import BaseModel
from lora_core.errors import OutOfMemory
from lora_core.kernels.selection import Kernels

GOAL_OVER_PEFT = 3.0
GOAL_OF_MATRIX_RATE = 0.5
PLATEAU = 0.95
"""Fraction of the best rate. The plateau starts at the smallest tick that reaches it."""

Turn = Callable[[], Report]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Sizes of the comparisons.

    `load` is that of many jobs. One job has the same rows. `datasheet_flops` is the GPU's bfloat16 matrix rate in its
    datasheet, or None for an unknown GPU.
    """

    shape: Shape
    device: str
    kernels: Kernels
    repeats: int
    load: Load
    tick_tokens: tuple[int, ...]
    tick_row_tokens: int
    matrix_tokens: int
    datasheet_flops: float | None

    def settings(self, base: BaseModel) -> dict[str, Any]:
        """Return the plan's settings for a results file."""
        return {
            "shape": asdict(self.shape),
            "block_parameters": sum(weight.numel() for weight in block_weights(base)),
            "dtype": "bfloat16",
            "targets": "all-linear",
            "load": asdict(self.load),
            "kernels": asdict(self.kernels),
            "repeats": self.repeats,
            "datasheet_flops": self.datasheet_flops,
        }


def run_all(plan: Plan, themes: list[str]) -> Iterator[Result]:
    """Yield the results of each theme, on one base model that is created once."""
    base = build(plan.shape, device=plan.device)
    for theme in themes:
        result = Result(theme=f"gpu_{theme}_{plan.shape.name}", settings=plan.settings(base))
        THEMES[theme](plan, base, result)
        yield result


def steady_state(plan: Plan, base: BaseModel, result: Result) -> None:
    """Alternate between one job, many jobs, PEFT, and the matmuls alone."""
    many = f"{plan.load.num_jobs} jobs"
    loads = {"1 job": replace(plan.load, num_jobs=1), many: plan.load}
    lorries = {name: Lorry(base, load, plan.kernels) for name, load in loads.items()}
    peft, matrix = Peft(base, plan.load), Matrix(base, plan.matrix_tokens)
    result.settings["packed equals solo"] = lorries[many].engine.invariance
    turns: dict[str, Turn] = {f"lorry_{name}": lorry.turn for name, lorry in lorries.items()}
    alternate(plan, turns | {"peft": peft.turn, "matrix": matrix.turn}, result)
    for contender in (*lorries.values(), peft, matrix):
        contender.close()
    for name in loads:
        _tell_lorry(plan, result, name, is_many=name == many)
    if theirs := result.repeats.get("peft"):
        result.find("peft, jobs one after another", _rate(theirs), "tokens/s")
        _tell_memory(result, "peft", theirs)
    matrix_flops = median_of(result.repeats["matrix"], "flops") / median_of(result.repeats["matrix"], "seconds")
    result.find("matrix rate", matrix_flops / 1e12, "TFLOP/s")


def _tell_lorry(plan: Plan, result: Result, name: str, *, is_many: bool) -> None:
    ours = result.repeats.get(f"lorry_{name}")
    if not ours:
        return
    result.find(f"lorry, {name}", _rate(ours), "tokens/s")
    if theirs := result.repeats.get("peft"):
        goal = GOAL_OVER_PEFT if is_many else None
        result.find(f"lorry over peft, {name}", median_ratio(rates(ours), rates(theirs)), "x", goal=goal)
    needed = [4 * result.settings["block_parameters"] * rate for rate in rates(ours)]
    share = median_ratio(needed, rates(result.repeats["matrix"], amount="flops"))
    goal = GOAL_OF_MATRIX_RATE if is_many else None
    result.find(f"share of the matrix rate (4P a token), {name}", share, "", goal=goal)
    if plan.datasheet_flops is not None:
        mfu = sorted(needed)[len(needed) // 2] / plan.datasheet_flops
        result.find(f"MFU by the datasheet, {name}", mfu, "", goal=goal)
    _tell_memory(result, name, ours)
    _tell_ticks(result, name, ours)


def kernels(plan: Plan, base: BaseModel, result: Result) -> None:
    """Compare the selected kernels with the plain ones, one by one, and with activation checkpointing."""
    lorry = Lorry(base, plan.load, plan.kernels)
    result.left_out |= {f"reason {number}": why for number, why in enumerate(plan.kernels.reasons, 1)}
    plain = Kernels()
    turns: dict[str, Turn] = {
        "as chosen": lambda: lorry.turn(checkpoint="never"),
        "recomputed blocks": lambda: lorry.turn(checkpoint="always"),
    }
    for part in ("lora", "attention", "elementwise"):
        if (slower := getattr(plain, part)) != getattr(plan.kernels, part):
            choice = replace(plan.kernels, **{part: slower})
            turns[f"{part}: {slower}"] = lambda choice=choice: lorry.turn(kernels=choice, checkpoint="never")
    alternate(plan, turns, result)
    lorry.close()
    for name, reports in result.repeats.items():
        result.find(name, _rate(reports), "tokens/s")
        _tell_memory(result, name, reports)
        _tell_ticks(result, name, reports)
    if chosen := result.repeats.get("as chosen"):
        for name, reports in result.repeats.items():
            if name != "as chosen":
                result.find(f"as chosen over {name}", median_ratio(rates(chosen), rates(reports)), "x")


def tick_sizes(plan: Plan, base: BaseModel, result: Result) -> None:
    """Measure ticks of exactly these numbers of tokens, spread evenly over as many jobs as possible."""
    for tokens in plan.tick_tokens:
        num_rows = tokens // plan.tick_row_tokens
        num_jobs = max(jobs for jobs in range(1, plan.load.num_jobs + 1) if num_rows % jobs == 0)
        row = plan.tick_row_tokens
        load = replace(plan.load, num_jobs=num_jobs, batch_size=num_rows // num_jobs, shortest=row, longest=row)
        with left_out(result, f"{tokens} tokens"):
            lorry = Lorry(base, load, plan.kernels)
            alternate(plan, {f"{tokens} tokens": lorry.turn}, result)
            lorry.close()
    found = {name: _rate(reports) for name, reports in result.repeats.items()}
    for name, rate in found.items():
        result.find(f"ticks of {name}", rate, "tokens/s")
        _tell_ticks(result, name, result.repeats[name])
    if found:
        first = next(name for name, rate in found.items() if rate >= PLATEAU * max(found.values()))
        result.find("the plateau begins at ticks of", int(first.partition(" ")[0]), "tokens")


THEMES: dict[str, Callable[[Plan, BaseModel, Result], None]] = {
    "steady_state": steady_state,
    "kernels": kernels,
    "tick_sizes": tick_sizes,
}


def alternate(plan: Plan, turns: dict[str, Turn], result: Result) -> None:
    """Run all contenders alternately for `plan.repeats` rounds after a warm-up. Those out of memory are skipped."""
    for number in range(1 + plan.repeats):
        for name in [name for name in turns if name not in result.left_out]:
            with left_out(result, name):
                report = turns[name]()
                if number > 0:
                    result.repeats.setdefault(name, []).append(report)


@contextmanager
def left_out(result: Result, name: str) -> Iterator[None]:
    """Record a contender that runs out of memory as skipped."""
    try:
        yield
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        result.left_out[name] = str(error).partition("\n")[0]
        result.repeats.pop(name, None)


def _rate(reports: list[Report]) -> float:
    """Return the median rate. In total tokens over total seconds, one disturbed turn would dominate."""
    return sorted(rates(reports))[len(reports) // 2]


def _tell_memory(result: Result, name: str, reports: list[Report]) -> None:
    """Report the memory of base model, adapters and tick in GB. The last is not available on a CPU."""
    for part in ("base", "rows"):
        if f"{part}_bytes" in reports[0]:
            result.find(f"  {name}, {part}", median_of(reports, f"{part}_bytes") / 1e9, "GB")
    if "peak_bytes" in reports[0]:
        taken = max(report["peak_bytes"] - report["resident_bytes"] for report in reports)
        result.find(f"  {name}, between forward and backward", taken / 1e9, "GB")
        result.find(f"  {name}, peak of the process", max(report["peak_bytes"] for report in reports) / 1e9, "GB")


def _tell_ticks(result: Result, name: str, reports: list[Report]) -> None:
    most = max(report["ticks"] for report in reports)
    if most > 1:
        result.left_out[f"{name} in one tick"] = f"split into {most} ticks for lack of memory"
