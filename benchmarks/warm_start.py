"""Latency until the first step: in a running trainer, in a warm standby or new trainer, and in a script.

Also measures the cost of an idle trainer.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import closing
from typing import Any

from benchmarks.gate import Contender, environment
from benchmarks.plan import Plan
from benchmarks.results import Result, median_of, median_ratio, shares
from benchmarks.trainer import Trainer
from benchmarks.workload import ROOT

GOAL_WARM_SECONDS = 1.0
GOAL_COLD_SECONDS = 2.0
"""In addition to loading the model."""
GOAL_IDLE_SHARE = 0.02
PACKAGES = ("torch", "transformers", "numba", "peft", "accelerate", "bitsandbytes", "pydantic")


def run(plan: Plan) -> Result:
    """Alternate between a warm standby trainer, from its settings to `ready`; a new trainer, from its launch, and a job
    with batch size 1 on it; and a script, from its start."""
    result = Result(theme="warm_start", settings=plan.settings() | {"batch_size": 1})
    timed = ("standing_by", "cold_load", "warm_start", "script", "idle", "standby_idle")
    result.repeats = {name: [] for name in timed}
    for index in range(plan.repeats):
        _stand_by(plan, index, result)
        started = time.monotonic()
        with Trainer(plan, f"trainer-{index}") as trainer:
            result.repeats["cold_load"].append(_seconds_to(trainer.wait_for("ready"), since=started))
            _run_job(trainer, "warm-up")
            result.repeats["warm_start"].append(_run_job(trainer, "job"))
            if index == 0:
                result.repeats["idle"].append(_stay_idle(plan, trainer))
        result.repeats["script"].append(_run_script(plan, index))
    _conclude(result)
    return result


def _stand_by(plan: Plan, index: int, result: Result) -> None:
    """Measure a warm standby trainer as an idle worker has it: started before it gets its base model."""
    with closing(Trainer(plan, f"standby-{index}")) as trainer:
        trainer.stand_by()
        trainer.wait_for("standing_by")
        if index == 0:
            result.repeats["standby_idle"].append(_stay_idle(plan, trainer))
        started = time.monotonic()
        trainer.begin()
        result.repeats["standing_by"].append(_seconds_to(trainer.wait_for("ready"), since=started))


def _seconds_to(ready: dict[str, Any], *, since: float) -> dict[str, float]:
    """Return the seconds until a trainer was ready, and those that it reports itself."""
    return {"seconds": ready["seconds"] - since} | {name: ready[name] for name in ready if "_seconds" in name}


def _run_job(trainer: Trainer, job: str) -> dict[str, float]:
    """Return the seconds from the message to the job's admission, to the end of its first step, and of its second.

    All processes share the clock. The second step has other rows than the first.
    """
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
    share = (trainer.processor_seconds() - before) / seconds
    return {"seconds": seconds, "share": share, "bytes": trainer.memory_bytes()}


def _run_script(plan: Plan, index: int) -> dict[str, float]:
    """Measure a script with PEFT and Trainer from the start of its process to its first step."""
    started = time.perf_counter()
    log = plan.folder / f"script-{index}.log"
    options: dict[str, Any] = plan.options() | {"batch_size": 1}
    with closing(Contender("peft_trainer", threads=1, log=log, **options)) as script:
        step = script.step()
        return {"seconds": time.perf_counter() - started, "step_seconds": step["seconds"]}


def _conclude(result: Result) -> None:
    warm, script, cold, ready = (result.repeats[name] for name in ("warm_start", "script", "cold_load", "standing_by"))
    result.find("Running trainer: request to admission", median_of(warm, "admitted_seconds"), "s")
    to_first_step = median_of(warm, "seconds")
    result.find("Running trainer: request to end of first step", to_first_step, "s", at_most=GOAL_WARM_SECONDS)
    result.find("Running trainer: first step", median_of(warm, "first_step_seconds"), "s")
    result.find("Running trainer: second step, with another row", median_of(warm, "second_step_seconds"), "s")
    result.find("Warm standby trainer: base model request to ready", median_of(ready, "seconds"), "s")
    result.find("Warm standby trainer: loading the model", median_of(ready, "load_seconds"), "s")
    result.find("Warm standby trainer: without loading the model", _beyond_load(ready), "s", at_most=GOAL_COLD_SECONDS)
    result.find("New trainer: launch to ready", median_of(cold, "seconds"), "s")
    result.find("New trainer: without loading the model", _beyond_load(cold), "s")
    result.find("Idle trainer: fraction of a core", result.repeats["idle"][0]["share"], "", at_most=GOAL_IDLE_SHARE)
    waits = result.repeats["standby_idle"][0]
    result.find("Idle warm standby trainer: fraction of a core", waits["share"], "", at_most=GOAL_IDLE_SHARE)
    result.find("Idle warm standby trainer: memory", waits["bytes"] / 1e6, "MB")
    result.find("PEFT + Trainer script: start to first step", median_of(script, "seconds"), "s")
    seconds = [[report["seconds"] for report in reports] for reports in (script, warm)]
    result.find("Time to first step: script / running trainer", median_ratio(*seconds), "x")


def _beyond_load(reports: list[dict[str, float]]) -> float:
    return sorted(report["seconds"] - report["load_seconds"] for report in reports)[len(reports) // 2]


def explain(_plan: Plan, result: Result) -> None:
    """Profile a start without standby: imports by package, loading, self-test, and the rest."""
    cold = result.repeats["cold_load"]
    imports = _import_seconds()
    known = {"load of the model": median_of(cold, "load_seconds"), "kernel self-test": median_of(cold, "probe_seconds")}
    rest = max(0.0, median_of(cold, "seconds") - sum(imports.values()) - sum(known.values()))
    result.profile = shares("cold start", imports | known | {"start of processes, and noise": rest})
    ready = result.repeats["standing_by"]
    result.why.append(
        f"Imports take {sum(imports.values()):.2f} s, mostly of torch and transformers, and an idle worker has done "
        f"them in advance. With a warm standby trainer, {median_of(ready, 'probe_seconds'):.2f} s "
        f"of {median_of(ready, 'seconds'):.2f} s are the kernel self-test."
    )


def _import_seconds() -> dict[str, float]:
    """Return the own time of the modules that the trainer imports, by package, from `python -X importtime`."""
    argv = [sys.executable, "-X", "importtime", "-c", "import worker.children.trainer.main"]
    told = subprocess.run(argv, cwd=ROOT, env=environment(1), capture_output=True, text=True, check=True).stderr
    seconds: dict[str, float] = {}
    for took, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)$", told, re.MULTILINE):
        package = module.partition(".")[0]
        own = "our own code" if package in ("lora_core", "worker", "catalog") else "other packages"
        of = package if package in PACKAGES else own
        seconds[f"import of {of}"] = seconds.get(f"import of {of}", 0.0) + int(took) / 1e6
    return seconds
