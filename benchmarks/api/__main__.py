"""Measure the API server and its database, and write a results file of each theme: `python -m benchmarks.api`."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.api import rates, sizes
from benchmarks.api.plan import ApiPlan, quick
from benchmarks.api.service import DATABASES
from benchmarks.results import Result, print_table, write
from benchmarks.workload import ROOT

THEMES = {"rates": rates.run, "size": sizes.run}


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="lorry-bench-api-", dir=options.folder) as name:
        databases = tuple(options.databases)
        plan = quick(Path(name), databases) if options.quick else _plan(options, Path(name))
        for theme in options.only or THEMES:
            print(f"{theme} …", flush=True)
            began, load_before = time.monotonic(), os.getloadavg()[0]
            results.append(THEMES[theme](plan))
            path = write(results[-1], options.out, note=options.note, load_before=load_before, module="benchmarks.api")
            print(f"{path} ({time.monotonic() - began:.0f} s)", flush=True)
    print_table(results)


def _plan(options: argparse.Namespace, folder: Path) -> ApiPlan:
    plan = ApiPlan(folder=folder, databases=tuple(options.databases), repeats=options.repeats, seconds=options.seconds)
    return replace(plan, many_jobs=options.jobs, connections=options.connections)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.api", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(THEMES), help="themes to run (default: all)")
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES, help="(default: both)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each load (default: 3)")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each run in seconds (default: 5)")
    parser.add_argument("--connections", type=int, default=16, help="concurrent connections of a load (default: 16)")
    parser.add_argument("--jobs", type=int, default=1_000_000, help="jobs in the large database (default: 1,000,000)")
    parser.add_argument("--folder", type=Path, help="temporary folder for SQLite files, about 10 GB")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for results")
    parser.add_argument("--note", help="note for the results file, such as other load on the machine")
    parser.add_argument("--quick", action="store_true", help="toy sizes: check that everything runs, measure nothing")
    return parser


if __name__ == "__main__":
    main()
