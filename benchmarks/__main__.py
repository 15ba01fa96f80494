"""`python -m benchmarks`: runs the comparisons, writes a results file of each, and prints what was found."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks import (
    eight_jobs,
    frozen_prefix,
    host_total,
    loss_head,
    pack_scaling,
    steady_state,
    submission,
    warm_start,
)
from benchmarks.plan import Plan, quick
from benchmarks.results import Result, print_table, write
from benchmarks.workload import ROOT, prepare

COMPARISONS = {
    "steady_state": steady_state.run,
    "warm_start": warm_start.run,
    "submission": submission.run,
    "pack_scaling": pack_scaling.run,
    "loss_head": loss_head.run,
    "frozen_prefix": frozen_prefix.run,
    "host_total": host_total.run,
    "eight_jobs": eight_jobs.run,
}
EXPLANATIONS = {
    "steady_state": steady_state.explain,
    "warm_start": warm_start.explain,
    "submission": submission.explain,
    "frozen_prefix": frozen_prefix.explain,
    "eight_jobs": eight_jobs.explain,
}
"""What shows, where a goal is missed, where the time goes; in a run of its own."""


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="lorry-bench-") as name:
        folder = Path(name)
        workload = prepare(base=options.base, data=options.data, folder=folder)
        repeats = options.repeats
        plan = quick(workload, folder) if options.quick else Plan(workload=workload, folder=folder, repeats=repeats)
        for theme in options.only or COMPARISONS:
            print(f"{theme} …", flush=True)
            load_before = os.getloadavg()[0]
            results.append(COMPARISONS[theme](plan))
            wanted = options.explain or (plan.explains and results[-1].misses_a_goal)
            if wanted and theme in EXPLANATIONS:
                EXPLANATIONS[theme](plan, results[-1])
            print(write(results[-1], options.out, note=options.note, load_before=load_before), flush=True)
    print_table(results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(COMPARISONS), help="these comparisons; else all")
    parser.add_argument("--base", type=Path, help="a base model's folder; else SmolLM2-135M-Instruct, fetched once")
    parser.add_argument("--data", type=Path, help="JSON lines of question and answer, as GSM8K's; else made rows")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender (5)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="where results are written")
    parser.add_argument("--explain", action="store_true", help="profile also where every goal is met")
    parser.add_argument("--note", help="what else the results file should say, as what the machine was busy with")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that all runs, measures nothing")
    return parser


if __name__ == "__main__":
    main()
