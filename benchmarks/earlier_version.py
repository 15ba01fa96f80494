"""Tokens per second of one warmed-up job on two cores, against an earlier version of Lorry and against Trainer.

Both versions of Lorry have the settings of their service. The earlier one computes with a lane of one thread per core.
Every contender is limited to AVX2 and float32, which `auto` selects on CPUs without bfloat16. So results of different
machines can be compared.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from benchmarks.gate import Contender
from benchmarks.plan import Plan
from benchmarks.results import Result, median_rate, median_ratio, rates
from benchmarks.workload import ROOT

GOAL_OVER_EARLIER = 1.6
THREADS = 2
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "haswell",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
"""Environment variables that limit torch, MKL, Numba and oneDNN to AVX2."""
OPTIONS: dict[str, dict[str, Any]] = {
    "lorry": {"name": "lorry", "threads": THREADS},
    "earlier": {"name": "several", "threads": 1, "lanes": THREADS, "jobs": 1},
    "peft_trainer": {"name": "peft_trainer", "threads": THREADS},
}
TITLES = {"lorry": "Lorry", "earlier": "An earlier version", "peft_trainer": "PEFT + Trainer"}


def run(plan: Plan, earlier: Path) -> Result:
    """`earlier` is a checkout of an earlier version."""
    result = Result(theme="earlier_version", settings=plan.settings() | {"dtype": "float32", "instructions": "AVX2"})
    num_tokens = round(plan.batch_size * plan.workload.num_tokens_per_row)
    options = plan.options() | {"dtype": "float32", "num_tokens": num_tokens}
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(
                closing(
                    Contender(
                        log=plan.folder / f"{name}.log",
                        checkout=earlier if name == "earlier" else ROOT,
                        variables=AVX2,
                        **OPTIONS[name],
                        **options,
                    )
                )
            )
            for name in TITLES
        }
        for contender in contenders.values():
            contender.step()  # warm-up
        for _ in range(plan.repeats):
            for name, contender in contenders.items():
                result.repeats.setdefault(name, []).append(contender.step())
    for name, title in TITLES.items():
        result.find(title, median_rate(result.repeats[name]), "tokens/s")
    ours, of_earlier, of_trainer = (rates(result.repeats[name]) for name in TITLES)
    result.find("Speedup over the earlier version", median_ratio(ours, of_earlier), "x", goal=GOAL_OVER_EARLIER)
    result.find("Speedup over PEFT + Trainer", median_ratio(ours, of_trainer), "x")
    result.find("The earlier version's speedup over PEFT + Trainer", median_ratio(of_earlier, of_trainer), "x")
    return result
