"""`python -m benchmarks.api`: measures the api and the database under it, and writes a results file of each theme."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.api import claimers, heartbeats, listeners, rates, sizes
from benchmarks.api.plan import ApiPlan, quick
from benchmarks.api.service import DATABASES
from benchmarks.results import Result, print_table, write
from benchmarks.workload import ROOT

THEMES = {"rates": rates.run, "listeners": listeners.run, "claims": claimers.run, "size": sizes.run}
THEMES |= {"heartbeats": heartbeats.run}


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
    return replace(plan, many_jobs=options.jobs, listeners=options.listeners, connections=options.connections)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.api", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(THEMES), help="these themes; else all")
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES, help="these; else both")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each load (3)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn (5)")
    parser.add_argument("--connections", type=int, default=16, help="of a load, at once (16)")
    parser.add_argument("--jobs", type=int, default=1_000_000, help="in the large database (1,000,000)")
    parser.add_argument("--listeners", type=int, default=10_000, help="on the one api process (10,000)")
    parser.add_argument("--folder", type=Path, help="where SQLite's files go while it runs; some 10 GB")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="where results are written")
    parser.add_argument("--note", help="what else the results file should say, as what the machine was busy with")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that all runs, measures nothing")
    return parser


if __name__ == "__main__":
    main()
