"""Eight adapters by the clock: one trainer, from its launch to the last export, against eight scripts in a row."""

from __future__ import annotations

import time

from benchmarks.gate import Contender
from benchmarks.plan import Plan
from benchmarks.results import Result, median_of, median_ratio
from benchmarks.trainer import Trainer


def run(plan: Plan) -> Result:
    """Both use all cores: the trainer a lane on each, a script a thread on each."""
    shape = {"jobs": plan.eight_jobs, "steps": plan.eight_steps, "batch_size": plan.eight_batch_size}
    result = Result(theme="eight_jobs", settings=plan.settings() | shape)
    result.repeats = {"lorry": [], "scripts": []}
    for index in range(max(1, plan.repeats // 3)):
        result.repeats["lorry"].append(_trainer(plan, index))
        result.repeats["scripts"].append(_scripts(plan, index))
    ours, theirs = ([report["seconds"] for report in reports] for reports in result.repeats.values())
    for name, reports in result.repeats.items():
        result.find(name, median_of(reports, "seconds"), "s")
    result.find("scripts over lorry", median_ratio(theirs, ours), "x")
    return result


def _trainer(plan: Plan, index: int) -> dict[str, float]:
    started = time.perf_counter()
    with Trainer(plan, f"eight-{index}") as trainer:
        for job in range(plan.eight_jobs):
            trainer.admit(str(job), num_steps=plan.eight_steps, batch_size=plan.eight_batch_size)
        trainer.wait_for("exported", count=plan.eight_jobs)
        return {"seconds": time.perf_counter() - started}


def _scripts(plan: Plan, index: int) -> dict[str, float]:
    started = time.perf_counter()
    options = plan.options() | {"batch_size": plan.eight_batch_size, "num_steps": plan.eight_steps}
    for job in range(plan.eight_jobs):
        log = plan.folder / f"script-{index}-{job}.log"
        Contender("peft_trainer", threads=plan.threads[-1], log=log, **options).finish()
    return {"seconds": time.perf_counter() - started}
