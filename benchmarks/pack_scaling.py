"""What packing gains: 1 to 32 small jobs in one tick, each as small as makes a core wait for memory."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from benchmarks.gate import Contender, Json
from benchmarks.plan import Plan
from benchmarks.results import Result, median_of, median_ratio, rates
from benchmarks.workload import write_tokens
from catalog.saturation import UNKNOWN, Speeds, free_places
from catalog.settings import Settings


def run(plan: Plan) -> Result:
    shape = {"rank": plan.pack_rank, "batch_size": 1}
    sizes = {"data": "random tokens", "tokens_per_row": plan.pack_tokens, "jobs": plan.pack_sizes, "lanes": plan.lanes}
    result = Result(theme="pack_scaling", settings=plan.settings() | shape | sizes)
    options = plan.options() | shape | {"tokens": str(_tokens(plan))}
    for lanes in plan.lanes:
        log = plan.folder / f"pack-{lanes}.log"
        with closing(Contender("pack", threads=1, log=log, lanes=lanes, **options)) as contender:
            contender.step(jobs=plan.pack_sizes[-1])  # warm-up
            for _ in range(plan.repeats):
                for jobs in plan.pack_sizes:
                    result.repeats.setdefault(f"{jobs}_jobs_{lanes}_lanes", []).append(contender.step(jobs=jobs))
        _conclude(plan, lanes, result)
    return result


def _tokens(plan: Plan):
    """Random rows, all of one length; the second half of each is learnt."""
    choose = np.random.default_rng(0)
    ids = choose.integers(0, plan.workload.vocab_size, (64, plan.pack_tokens)).astype(np.int32)
    mask = (np.arange(plan.pack_tokens) >= plan.pack_tokens // 2).astype(np.uint8)
    return write_tokens([(row, mask) for row in ids], plan.folder / "pack-tokens.safetensors")


def _conclude(plan: Plan, lanes: int, result: Result) -> None:
    where = f"{lanes} lane{'s' * (lanes > 1)}"
    reports = {jobs: result.repeats[f"{jobs}_jobs_{lanes}_lanes"] for jobs in plan.pack_sizes}
    alone = reports[plan.pack_sizes[0]]
    slowdowns: dict[int, float] = {}
    for jobs, together in reports.items():
        result.find(f"{jobs} jobs, {where}", sorted(rates(together))[len(together) // 2], "tokens/s")
        slowdowns[jobs] = jobs / median_ratio(rates(together), rates(alone))
        if jobs > plan.pack_sizes[0]:
            result.find(f"  each slower than alone, {where}", slowdowns[jobs], "x")
    most = plan.pack_sizes[-1]
    grown = (median_of(reports[most], "bytes") - median_of(alone, "bytes")) / (most - plan.pack_sizes[0])
    result.find(f"memory of a further job, {where}", grown / 1e6, "MB")
    _hold_to_promise(plan, where, result, reports, slowdowns)


def _hold_to_promise(
    plan: Plan, where: str, result: Result, reports: dict[int, list[Json]], slowdowns: dict[int, float]
) -> None:
    """Jobs join as a trainer would let them, which learns of each size as it comes to it."""
    bound = float(Settings.model_fields["max_slowdown"].default)
    known = {jobs: (jobs * plan.pack_tokens, sorted(rates(found))[len(found) // 2]) for jobs, found in reports.items()}
    num_jobs, speeds = 0, UNKNOWN
    while places := free_places(num_jobs, speeds, max_slowdown=bound, at_most=plan.pack_sizes[-1] - num_jobs):
        num_jobs += places
        seen = tuple(point for jobs, point in known.items() if 1 < jobs <= num_jobs)
        speeds = Speeds(alone=(known[plan.pack_sizes[0]],), together=seen)
    measured = [size for size in plan.pack_sizes if size <= num_jobs][-1]
    result.find(f"jobs let in, {where}", num_jobs, "")
    result.find(f"  each slower than alone, measured with {measured}", slowdowns[measured], "x", at_most=bound)
