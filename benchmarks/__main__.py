"""Run the comparisons, write a results file of each, and print a table: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import (
    earlier_version,
    eight_jobs,
    frozen_prefix,
    gpu_host,
    host_total,
    loss_head,
    pack_scaling,
    steady_state,
    submission,
    warm_start,
)
from benchmarks.inference import comparison
from benchmarks.plan import Plan, quick
from benchmarks.results import Result, print_table, write
from benchmarks.workload import ROOT, Workload, prepare
from worker.node import devices

COMPARISONS = {
    "steady_state": steady_state.run,
    "warm_start": warm_start.run,
    "submission": submission.run,
    "pack_scaling": pack_scaling.run,
    "loss_head": loss_head.run,
    "frozen_prefix": frozen_prefix.run,
    "host_total": host_total.run,
    "gpu_host": gpu_host.run,
    "eight_jobs": eight_jobs.run,
    "inference": comparison.run,
}
EARLIER = "earlier_version"
"""A comparison that needs another checkout."""
EXPLANATIONS = {
    "steady_state": steady_state.explain,
    "warm_start": warm_start.explain,
    "submission": submission.explain,
    "frozen_prefix": frozen_prefix.explain,
    "eight_jobs": eight_jobs.explain,
}
"""Profiles, measured in separate runs, that show where the time goes if a goal is missed."""


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.earlier is None) is (EARLIER in (options.only or [])):
        parser.error(f"--only {EARLIER} and --earlier belong together")
    comparisons = COMPARISONS | {EARLIER: partial(earlier_version.run, earlier=options.earlier)}
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="lorry-bench-") as name:
        folder = Path(name)
        workload = prepare(base=options.base, data=options.data, folder=folder)
        plan = quick(workload, folder) if options.quick else _plan(workload, folder, options.repeats)
        for theme in options.only or COMPARISONS:
            print(f"{theme} …", flush=True)
            load_before = os.getloadavg()[0]
            results.append(comparisons[theme](plan))
            wanted = options.explain or (plan.explains and results[-1].misses_a_goal)
            if wanted and theme in EXPLANATIONS:
                EXPLANATIONS[theme](plan, results[-1])
            print(write(results[-1], options.out, note=options.note, load_before=load_before), flush=True)
    print_table(results)


def _plan(workload: Workload, folder: Path, repeats: int) -> Plan:
    """Return the sizes of `make bench`, in the precision that Lorry chooses on this machine."""
    dtype = "bfloat16" if devices.cpu().has_bfloat16 else "float32"
    return Plan(workload=workload, folder=folder, repeats=repeats, dtype=dtype)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=(*COMPARISONS, EARLIER), help="comparisons to run (default: all)")
    parser.add_argument("--earlier", type=Path, help=f"checkout of an earlier version of Lorry, for --only {EARLIER}")
    parser.add_argument("--base", type=Path, help="base model folder (default: SmolLM2-135M-Instruct, downloaded once)")
    parser.add_argument("--data", type=Path, help="JSONL with question and answer, as GSM8K (default: synthetic rows)")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each contender (default: 5)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for results")
    parser.add_argument("--explain", action="store_true", help="profile even if every goal is met")
    parser.add_argument("--note", help="note for the results file, such as other load on the machine")
    parser.add_argument("--quick", action="store_true", help="toy sizes: check that everything runs, measure nothing")
    return parser


if __name__ == "__main__":
    main()
