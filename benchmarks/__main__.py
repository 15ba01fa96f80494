"""Run the comparisons, write a results file of each, and print a table: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks import eight_jobs, inference, steady_state
from benchmarks.plan import Plan, quick
from benchmarks.results import Result, print_table, write
from benchmarks.workload import ROOT, prepare
from worker.node import devices

COMPARISONS = {"steady_state": steady_state.run, "eight_jobs": eight_jobs.run, "inference": inference.run}


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="lorry-bench-") as name:
        folder = Path(name)
        workload = prepare(base=options.base, data=options.data, folder=folder)
        if options.quick:
            plan = quick(workload, folder)
        else:  # the precision that Lorry chooses on this machine
            dtype = "bfloat16" if devices.cpu().has_bfloat16 else "float32"
            plan = Plan(workload=workload, folder=folder, repeats=options.repeats, dtype=dtype)
        for theme in options.only or COMPARISONS:
            print(f"{theme} …", flush=True)
            load_before = os.getloadavg()[0]
            results.append(COMPARISONS[theme](plan))
            print(write(results[-1], options.out, note=options.note, load_before=load_before), flush=True)
    print_table(results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(COMPARISONS), help="comparisons to run (default: all)")
    parser.add_argument("--base", type=Path, help="base model folder (default: SmolLM2-135M-Instruct, downloaded once)")
    parser.add_argument("--data", type=Path, help="JSONL with question and answer, as GSM8K (default: synthetic rows)")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each contender (default: 5)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for results")
    parser.add_argument("--note", help="note for the results file, such as other load on the machine")
    parser.add_argument("--quick", action="store_true", help="toy sizes: check that everything runs, measure nothing")
    return parser


if __name__ == "__main__":
    main()
