"""Measure the engine on a CUDA GPU, and write a results file of each comparison: `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.comparisons import THEMES, Plan, run_all
from benchmarks.gpu.load import Load
from benchmarks.gpu.shapes import SHAPES, TOY
from benchmarks.results import Result, print_table, write
from benchmarks.workload import ROOT
from lora_core.kernels.selection import Kernels, choose_kernels

DEVICE = "cuda:0"
NO_GPU = """This benchmark needs a CUDA GPU, but torch finds none here (torch {version}).
Run it on a machine with a GPU and a CUDA build of torch (TORCH_INDEX=none make bench-gpu installs PyPI's),
or use --quick to check at toy sizes on a CPU that everything runs."""
DATASHEET_FLOPS = {  # dense bfloat16, by a part of the card's name; the first match counts
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.quick and not torch.cuda.is_available():
        parser.exit(2, NO_GPU.format(version=torch.__version__) + "\n")
    results: list[Result] = []
    plans = [quick()] if options.quick else [full(shape, options.repeats) for shape in options.shapes]
    load_before = os.getloadavg()[0]
    for plan in plans:
        print(f"{plan.shape.name} on {plan.device}: {plan.kernels}", flush=True)
        for result in run_all(plan, options.only or list(THEMES)):
            results.append(result)
            path = write(
                result,
                options.out,
                note=options.note,
                load_before=load_before,
                module="benchmarks.gpu",
                gpu=None if options.quick else card(),
            )
            print(path, flush=True)
    print_table(results)


def full(shape: str, repeats: int) -> Plan:
    """Return the plan: 16 jobs with batch size 4 and rows of 32 to 480 tokens, on average 16,384 tokens per tick."""
    device = torch.device(DEVICE)
    return Plan(
        shape=SHAPES[shape],
        device=DEVICE,
        kernels=choose_kernels(device, torch.bfloat16),
        repeats=repeats,
        load=Load(num_jobs=16, batch_size=4, shortest=32, longest=480, rank=16),
        tick_tokens=(1024, 2048, 4096, 8192, 16_384, 32_768),
        tick_row_tokens=256,
        matrix_tokens=16_384,
        datasheet_flops=datasheet_flops(torch.cuda.get_device_name(device)),
    )


def quick() -> Plan:
    """Return toy sizes for one CPU core, with the kernels of a CPU."""
    torch.set_num_threads(1)
    return Plan(
        shape=TOY,
        device="cpu",
        kernels=Kernels(),
        repeats=1,
        load=Load(num_jobs=3, batch_size=2, shortest=8, longest=24, rank=4),
        tick_tokens=(32, 64),
        tick_row_tokens=16,
        matrix_tokens=32,
        datasheet_flops=1e12,
    )


def datasheet_flops(name: str) -> float | None:
    return next((flops for part, flops in DATASHEET_FLOPS.items() if part in name), None)


def card() -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(DEVICE)
    return {
        "name": facts.name,
        "memory_bytes": facts.total_memory,
        "multiprocessors": facts.multi_processor_count,
        "capability": f"{facts.major}.{facts.minor}",
        "cuda": torch.version.cuda,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES), help="base models (default: all)"
    )
    parser.add_argument("--only", nargs="+", choices=tuple(THEMES), help="comparisons to run (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each contender (default: 5)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for results")
    parser.add_argument("--note", help="note for the results file")
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes on a CPU: check that everything runs, measure nothing"
    )
    return parser


if __name__ == "__main__":
    main()
