"""Wall clock and memory of eight adapters: one trainer against scripts with PEFT and Trainer.

The trainer is measured from its launch until PEFT has verified the last adapter. The scripts run one after another, and
two at a time.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.gate import Contender
from benchmarks.plan import Plan
from benchmarks.results import Result, median_of
from benchmarks.trainer import Trainer

GOAL_OVER_SCRIPTS = 6.0
GOAL_OF_PEAK = 1.3
ONE_BY_ONE, IN_PAIRS = "scripts one after another", "scripts two at a time"
TITLES = {"lorry": "Lorry, all jobs", "lorry, one job": "Lorry, one job"}
TITLES |= {name: name.capitalize() for name in (ONE_BY_ONE, IN_PAIRS)}


def run(plan: Plan) -> Result:
    """All use all cores: the trainer one lane per core, a single script one thread per core, two scripts one each."""
    shape = {
        "jobs": plan.eight_jobs,
        "steps": plan.eight_steps,
        "scripts_run": min(plan.eight_scripts, plan.eight_jobs),
    }
    result = Result(theme="eight_jobs", settings=plan.settings() | shape)
    result.repeats = {
        "lorry": [_trainer(plan, plan.eight_jobs)],
        ONE_BY_ONE: [_scripts(plan, side_by_side=1, threads=plan.threads[-1])],
        IN_PAIRS: [_scripts(plan, side_by_side=2, threads=1)],
        "lorry, one job": [_trainer(plan, 1)],
    }
    _conclude(result)
    return result


def _trainer(plan: Plan, num_jobs: int) -> dict[str, float]:
    """Measure a trainer until all jobs are exported, which follows verification by PEFT. A failed one is an error."""
    started, began = time.perf_counter(), time.monotonic()
    with Trainer(plan, f"eight-{num_jobs}") as trainer:
        for job in range(num_jobs):
            trainer.admit(str(job), num_steps=plan.eight_steps, batch_size=plan.batch_size)
        ready, before, verifying = trainer.wait_for("ready")["seconds"] - began, 0.0, 0.0
        for number in range(num_jobs):
            event = trainer.wait_for("exported", count=number + 1)
            assert event["report"]["passed"], event["report"]
            finished = trainer.wait_for("finished", event["claim_id"])["seconds"]
            verifying += event["seconds"] - max(finished, before)
            before = event["seconds"]
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "ready_seconds": ready,
            "verifying_seconds": verifying,
            "peak_bytes": trainer.peak_bytes(),
        }


def _scripts(plan: Plan, *, side_by_side: int, threads: int) -> dict[str, float]:
    """Run some of the scripts, and extrapolate to all eight, since they do the same work."""
    options: dict[str, Any] = plan.options() | {"num_steps": plan.eight_steps}
    rounds = max(1, min(plan.eight_scripts, plan.eight_jobs) // side_by_side)
    started, peaks = time.perf_counter(), [0]
    for turn in range(rounds):
        log = plan.folder / f"scripts-{side_by_side}-{turn}.log"
        scripts = [Contender("peft_trainer", threads=threads, log=log, **options) for _ in range(side_by_side)]
        peaks += [script.finish() for script in scripts]
    measured = time.perf_counter() - started
    all_of_them = measured * plan.eight_jobs / (rounds * side_by_side)
    return {
        "seconds": all_of_them,
        "measured_seconds": measured,
        "scripts_run": rounds * side_by_side,
        "peak_bytes": max(peaks),
    }


def _conclude(result: Result) -> None:
    for name, reports in result.repeats.items():
        result.find(f"{TITLES[name]}{_extrapolated(name, result)}: wall-clock time", median_of(reports, "seconds"), "s")
        result.find(f"{TITLES[name]}: peak memory of a process", median_of(reports, "peak_bytes") / 1e6, "MB")
    ours, alone = result.repeats["lorry"][0], result.repeats["lorry, one job"][0]
    for name, goal in ((ONE_BY_ONE, GOAL_OVER_SCRIPTS), (IN_PAIRS, None)):
        ratio = result.repeats[name][0]["seconds"] / ours["seconds"]
        result.find(f"Speedup over {name}{_extrapolated(name, result)}", ratio, "x", goal=goal)
    script = result.repeats[ONE_BY_ONE][0]
    for peer, other in (("one script", script), ("with one job", alone)):
        ratio = ours["peak_bytes"] / other["peak_bytes"]
        result.find(f"Peak memory: Lorry with all jobs / {peer}", ratio, "x", at_most=GOAL_OF_PEAK)


def _extrapolated(name: str, result: Result) -> str:
    """Return the part of a label that names the number of scripts that were run, if it is not that of the jobs."""
    num_run = result.repeats[name][0].get("scripts_run", result.settings["jobs"])
    return "" if num_run == result.settings["jobs"] else f", extrapolated from {num_run}"
