"""Speedup from packing: 1 to 32 jobs in one tick, each so small that a core alone would wait for memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np

from benchmarks.gate import Contender, Json
from benchmarks.plan import Plan
from benchmarks.results import Result, median_of, median_rate, median_ratio, rates
from benchmarks.workload import write_tokens
from catalog.resources.throughput import UNKNOWN, Speeds, free_places
from catalog.settings import Settings


def run(plan: Plan) -> Result:
    shape = {"rank": plan.pack_rank, "batch_size": 1}
    sizes = {"data": "random tokens", "tokens_per_row": plan.pack_tokens, "jobs": plan.pack_sizes, "lanes": plan.lanes}
    result = Result(theme="pack_scaling", settings=plan.settings() | shape | sizes)
    options: dict[str, Any] = plan.options() | shape | {"tokens": str(_tokens(plan))}
    for lanes in plan.lanes:
        log = plan.folder / f"pack-{lanes}.log"
        with closing(Contender("pack", threads=1, log=log, lanes=lanes, **options)) as contender:
            contender.step(jobs=plan.pack_sizes[-1])  # the first step of a process is the slowest
            for jobs in plan.pack_sizes * plan.pack_warm_up:
                contender.step(jobs=jobs)
            reports = _take_turns(plan, contender, plan.pack_sizes)
            result.repeats |= {f"{jobs}_jobs_{lanes}_lanes": found for jobs, found in reports.items()}
            _conclude(plan, lanes, result, reports)
            _hold_to_promise(plan, lanes, result, reports, contender)
    return result


def _take_turns(plan: Plan, contender: Contender, sizes: Sequence[int]) -> dict[int, list[Json]]:
    """Run all sizes alternately. Return the reports by number of jobs."""
    reports: dict[int, list[Json]] = {jobs: [] for jobs in sizes}
    for _ in range(plan.repeats):
        for jobs in sizes:
            reports[jobs].append(contender.step(jobs=jobs))
    return reports


def _tokens(plan: Plan):
    """Write random rows of equal length. The second half of each row is trained on."""
    choose = np.random.default_rng(0)
    ids = choose.integers(0, plan.workload.vocab_size, (64, plan.pack_tokens)).astype(np.int32)
    mask = (np.arange(plan.pack_tokens) >= plan.pack_tokens // 2).astype(np.uint8)
    return write_tokens([(row, mask) for row in ids], plan.folder / "pack-tokens.safetensors")


def _conclude(plan: Plan, lanes: int, result: Result, reports: dict[int, list[Json]]) -> None:
    where = _where(lanes)
    alone = reports[plan.pack_sizes[0]]
    for jobs, together in reports.items():
        name = f"{jobs} job{'s' * (jobs > 1)}, {where}"
        result.find(name, median_rate(together), "tokens/s")
        if jobs > plan.pack_sizes[0]:
            result.find(f"{name}: slowdown of each job", _slowdown(jobs, together, alone), "x")
    most = plan.pack_sizes[-1]
    grown = (median_of(reports[most], "bytes") - median_of(alone, "bytes")) / (most - plan.pack_sizes[0])
    result.find(f"Memory of each additional job, {where}", grown / 1e6, "MB")


def _hold_to_promise(
    plan: Plan, lanes: int, result: Result, reports: dict[int, list[Json]], contender: Contender
) -> None:
    """Admit jobs as a trainer would, which learns the speed of each size when it reaches it, and check the slowdown.

    If the number of admitted jobs is not in the plan, it is measured separately, alternating with one job.
    """
    bound = float(Settings.model_fields["max_slowdown"].default)
    one, most = plan.pack_sizes[0], plan.pack_sizes[-1]
    alone = dict.fromkeys(reports, reports[one])
    known, num_jobs, speeds = dict(reports), 0, UNKNOWN
    while places := free_places(num_jobs, speeds, max_slowdown=bound, at_most=most - num_jobs):
        num_jobs += places
        if num_jobs not in known:
            turns = _take_turns(plan, contender, (one, num_jobs))
            known[num_jobs], alone[num_jobs] = turns[num_jobs], turns[one]
            result.repeats |= {f"{jobs}_jobs_{lanes}_lanes_for_{num_jobs}": found for jobs, found in turns.items()}
        points = {jobs: (jobs * plan.pack_tokens, median_rate(found)) for jobs, found in sorted(known.items())}
        seen = tuple(point for jobs, point in points.items() if one < jobs <= num_jobs)
        speeds = Speeds(alone=(points[one],), together=seen)
    where = _where(lanes)
    result.find(f"Jobs that Lorry admits, {where}", num_jobs, "")
    measured = _slowdown(num_jobs, known[num_jobs], alone[num_jobs])
    result.find(f"{num_jobs} admitted jobs, {where}: slowdown of each job", measured, "x", at_most=bound)


def _where(lanes: int) -> str:
    return f"{lanes} lane{'s' * (lanes > 1)}"


def _slowdown(num_jobs: int, together: list[Json], alone: list[Json]) -> float:
    """Return the slowdown of each job. `alone` contains reports of the same turns."""
    return num_jobs / median_ratio(rates(together), rates(alone))
