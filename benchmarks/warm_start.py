"""How long a person waits for the first step: in a trainer that runs, in one that starts, and in a script."""

from __future__ import annotations

import time
from contextlib import closing

from benchmarks.gate import Contender
from benchmarks.plan import Plan
from benchmarks.results import Result, median_of, median_ratio
from benchmarks.trainer import Trainer


def run(plan: Plan) -> Result:
    """In turn: a trainer from its launch to `ready`; a job of that trainer; a script from its start."""
    result = Result(theme="warm_start", settings=plan.settings())
    result.repeats = {"cold_load": [], "warm_start": [], "script": []}
    for index in range(plan.repeats):
        started = time.perf_counter()
        with Trainer(plan, f"trainer-{index}") as trainer:
            ready = trainer.wait_for("ready")
            cold = {"seconds": time.perf_counter() - started, "load_seconds": ready["load_seconds"]}
            result.repeats["cold_load"].append(cold)
            _run_job(plan, trainer, "warm-up")
            result.repeats["warm_start"].append(_run_job(plan, trainer, "job"))
        result.repeats["script"].append(_run_script(plan, index))
    _conclude(result)
    return result


def _run_job(plan: Plan, trainer: Trainer, job: str) -> dict[str, float]:
    """`seconds` from the message to the first step, and `step_seconds` of the second step, whose rows are others."""
    started = time.perf_counter()
    trainer.admit(job, num_steps=2, batch_size=plan.batch_size)
    first = trainer.wait_for("stepped", job)
    seconds = time.perf_counter() - started
    second = trainer.wait_for("stepped", job, count=2)
    trainer.wait_for("exported", job)
    return {"seconds": seconds, "step_seconds": second["seconds"] - first["seconds"]}


def _run_script(plan: Plan, index: int) -> dict[str, float]:
    """From a process's start to its first step with PEFT and Trainer."""
    started = time.perf_counter()
    log = plan.folder / f"script-{index}.log"
    with closing(Contender("peft_trainer", threads=1, log=log, **plan.options())) as script:
        step = script.step()
        return {"seconds": time.perf_counter() - started, "step_seconds": step["seconds"]}


def _conclude(result: Result) -> None:
    warm, script = result.repeats["warm_start"], result.repeats["script"]
    result.find("message to first step, warm", median_of(warm, "seconds"), "s")
    result.find("  the second step, of other rows", median_of(warm, "step_seconds"), "s")
    result.find("launch to ready", median_of(result.repeats["cold_load"], "seconds"), "s")
    result.find("script's start to first step", median_of(script, "seconds"), "s")
    seconds = [[report["seconds"] for report in reports] for reports in (script, warm)]
    result.find("script over warm", median_ratio(*seconds), "x")
