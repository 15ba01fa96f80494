"""Total throughput of a host: one process with a lane per core, against a process per core on one memory-mapped model.

Measured for several jobs, and for a single job with slices of several sizes.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import Any

from benchmarks.gate import Contender, Json
from benchmarks.plan import Plan
from benchmarks.results import Result, median_of, median_ratio, rates


def run(plan: Plan) -> Result:
    cores = plan.lanes[-1]
    shape = {"jobs": plan.host_jobs, "cores": cores, "slice_tokens": plan.slices}
    result = Result(theme="host_total", settings=plan.settings() | shape)
    middle = plan.slices[len(plan.slices) // 2]
    with ExitStack() as stack:

        def hosts(count: int, **options: Any) -> list[Contender]:
            log = plan.folder / "host.log"
            return [
                stack.enter_context(closing(Contender("several", threads=1, log=log, **plan.options(), **options)))
                for _ in range(count)
            ]

        setups = {
            f"{plan.host_jobs} jobs, one process with {cores} lane{'s' * (cores > 1)}": hosts(
                1, jobs=plan.host_jobs, lanes=cores, slice_tokens=middle
            ),
            f"{plan.host_jobs} jobs, {cores} processes with 1 lane": hosts(
                cores, jobs=max(1, plan.host_jobs // cores), lanes=1, slice_tokens=middle
            ),
            "1 job, one process with 1 lane": hosts(1, jobs=1, lanes=1, slice_tokens=plan.slices[0]),
            **{
                f"1 job, one process with {cores} lanes, slices of {size} tokens": hosts(
                    1, jobs=1, lanes=cores, slice_tokens=size
                )
                for size in plan.slices
            },
        }
        for turn in range(plan.repeats + 1):  # the first turn is a warm-up
            for name, contenders in setups.items():
                report = _together(contenders)
                if turn:
                    result.repeats.setdefault(name, []).append(report)
    _conclude(result)
    return result


def _together(contenders: list[Contender]) -> Json:
    """Run a step of each at the same time. Report all tokens, and the seconds of the slowest."""
    for contender in contenders:
        contender.begin()
    reports = [contender.report() for contender in contenders]
    return {
        "tokens": sum(report["tokens"] for report in reports),
        "bytes": sum(report["bytes"] for report in reports),
        "seconds": max(report["seconds"] for report in reports),
        "cpu_seconds": sum(report["cpu_seconds"] for report in reports),
    }


def _conclude(result: Result) -> None:
    for name, reports in result.repeats.items():
        found = rates(reports)
        result.find(name, sorted(found)[len(found) // 2], "tokens/s")
        result.find(f"{name}: memory", median_of(reports, "bytes") / 1e6, "MB")
    lanes, processes = list(result.repeats.values())[:2]
    result.find("Throughput ratio, lanes / processes", median_ratio(rates(lanes), rates(processes)), "x")
    by_cpu = [rates(reports, clock="cpu_seconds") for reports in (lanes, processes)]
    result.find("Throughput ratio, lanes / processes, by CPU time", median_ratio(*by_cpu), "x")
