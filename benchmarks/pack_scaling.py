"""What packing gains: 1 to 32 small jobs in one tick, each as small as makes a core wait for memory."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from benchmarks.gate import Contender
from benchmarks.plan import Plan
from benchmarks.results import Result, median_ratio, rates
from benchmarks.workload import write_tokens


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
    alone = rates(result.repeats[f"{plan.pack_sizes[0]}_jobs_{lanes}_lanes"])
    for jobs in plan.pack_sizes:
        together = rates(result.repeats[f"{jobs}_jobs_{lanes}_lanes"])
        result.find(f"{jobs} jobs, {where}", sorted(together)[len(together) // 2], "tokens/s")
        if jobs > plan.pack_sizes[0]:
            result.find(f"{jobs} jobs over one, {where}", median_ratio(together, alone), "x")
