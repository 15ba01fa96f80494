"""How long a person waits for the first step: in a trainer that runs, in one that starts, and in a script; and what a
trainer costs that has nothing to do."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import closing

from benchmarks.gate import Contender, environment
from benchmarks.plan import Plan
from benchmarks.results import Result, median_of, median_ratio, shares
from benchmarks.trainer import Trainer
from benchmarks.workload import ROOT

GOAL_WARM_SECONDS = 1.0
GOAL_COLD_SECONDS = 2.0
"""Beyond the model's load."""
GOAL_IDLE_SHARE = 0.02
PACKAGES = ("torch", "transformers", "numba", "peft", "accelerate", "bitsandbytes", "pydantic")


def run(plan: Plan) -> Result:
    """In turn: a trainer from its launch to `ready`; a job of that trainer, of batch 1; a script from its start."""
    result = Result(theme="warm_start", settings=plan.settings() | {"batch_size": 1})
    result.repeats = {"cold_load": [], "warm_start": [], "script": [], "idle": []}
    for index in range(plan.repeats):
        started = time.monotonic()
        with Trainer(plan, f"trainer-{index}") as trainer:
            ready = trainer.wait_for("ready")
            cold = {
                "seconds": ready["seconds"] - started,
                **{name: ready[name] for name in ready if "_seconds" in name},
            }
            result.repeats["cold_load"].append(cold)
            _run_job(trainer, "warm-up")
            result.repeats["warm_start"].append(_run_job(trainer, "job"))
            if index == 0:
                result.repeats["idle"].append(_stay_idle(plan, trainer))
        result.repeats["script"].append(_run_script(plan, index))
    _conclude(result)
    return result


def _run_job(trainer: Trainer, job: str) -> dict[str, float]:
    """Seconds from the message to the job's admission and to the end of its first step, by the clock that all
    processes share; and of the second step, whose rows are others."""
    sent = time.monotonic()
    trainer.admit(job, num_steps=2, batch_size=1)
    admitted, first = trainer.wait_for("admitted", job), trainer.wait_for("stepped", job)
    second = trainer.wait_for("stepped", job, count=2)
    trainer.wait_for("exported", job)
    return {
        "admitted_seconds": admitted["seconds"] - sent,
        "seconds": first["seconds"] - sent,
        "first_step_seconds": first["seconds"] - admitted["seconds"],
        "second_step_seconds": second["seconds"] - first["seconds"],
    }


def _stay_idle(plan: Plan, trainer: Trainer) -> dict[str, float]:
    before, began = trainer.processor_seconds(), time.monotonic()
    time.sleep(plan.idle_seconds)
    seconds = time.monotonic() - began
    return {"seconds": seconds, "share": (trainer.processor_seconds() - before) / seconds}


def _run_script(plan: Plan, index: int) -> dict[str, float]:
    """From a process's start to its first step with PEFT and Trainer."""
    started = time.perf_counter()
    log = plan.folder / f"script-{index}.log"
    options = plan.options() | {"batch_size": 1}
    with closing(Contender("peft_trainer", threads=1, log=log, **options)) as script:
        step = script.step()
        return {"seconds": time.perf_counter() - started, "step_seconds": step["seconds"]}


def _conclude(result: Result) -> None:
    warm, script, cold = (result.repeats[name] for name in ("warm_start", "script", "cold_load"))
    result.find("message to admission, warm", median_of(warm, "admitted_seconds"), "s")
    result.find(
        "message to the end of the first step, warm", median_of(warm, "seconds"), "s", at_most=GOAL_WARM_SECONDS
    )
    result.find("  of which the step", median_of(warm, "first_step_seconds"), "s")
    result.find("  the second step, of another row", median_of(warm, "second_step_seconds"), "s")
    result.find("launch to ready, cold", median_of(cold, "seconds"), "s")
    result.find("  of which the model's load", median_of(cold, "load_seconds"), "s")
    beyond = sorted(report["seconds"] - report["load_seconds"] for report in cold)[len(cold) // 2]
    result.find("  beyond the load", beyond, "s", at_most=GOAL_COLD_SECONDS)
    result.find("idle trainer, share of a core", result.repeats["idle"][0]["share"], "", at_most=GOAL_IDLE_SHARE)
    result.find("script's start to first step", median_of(script, "seconds"), "s")
    seconds = [[report["seconds"] for report in reports] for reports in (script, warm)]
    result.find("script over warm", median_ratio(*seconds), "x")


def explain(_plan: Plan, result: Result) -> None:
    """Where a cold start spends its time: imports by package, the load, the probe, and what is between them."""
    cold = result.repeats["cold_load"]
    imports = _import_seconds()
    known = {"load of the model": median_of(cold, "load_seconds"), "probe of kernels": median_of(cold, "probe_seconds")}
    rest = max(0.0, median_of(cold, "seconds") - sum(imports.values()) - sum(known.values()))
    result.profile = shares("cold start", imports | known | {"start of processes, and noise": rest})
    result.why.append(
        f"Imports take {sum(imports.values()):.2f} s, of which torch and transformers are not ours to shorten; a "
        "process that has them imported and waits for a base would hide them, for about 250 MB in an idle worker."
    )


def _import_seconds() -> dict[str, float]:
    """Own time of each module that the trainer imports, by its package; as `python -X importtime` tells."""
    argv = [sys.executable, "-X", "importtime", "-c", "import worker.train_entry"]
    told = subprocess.run(argv, cwd=ROOT, env=environment(1), capture_output=True, text=True, check=True).stderr
    seconds: dict[str, float] = {}
    for took, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)$", told, re.MULTILINE):
        package = module.partition(".")[0]
        own = "our own code" if package in ("lora_core", "worker", "catalog") else "other packages"
        of = package if package in PACKAGES else own
        seconds[f"import of {of}"] = seconds.get(f"import of {of}", 0.0) + int(took) / 1e6
    return seconds
