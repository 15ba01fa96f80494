"""Tokens per second of one warmed-up job, against common ways to train one."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import Any

from benchmarks.gate import Contender
from benchmarks.plan import Plan
from benchmarks.results import Result, median_of, median_rate, median_ratio, rates

GOAL_OVER_TRAINER = 4.0
GOAL_OF_MATRIX_RATE = 0.6
TITLES = {"peft_loop": "a plain PEFT loop", "peft_trainer": "PEFT + Trainer", "trl_sft": "TRL SFTTrainer"}


def run(plan: Plan) -> Result:
    result = Result(theme="steady_state", settings=plan.settings())
    for threads in plan.threads:
        _alternate(plan, threads, result)
        _conclude(plan, threads, result)
    return result


def _alternate(plan: Plan, threads: int, result: Result) -> None:
    """Run one step of each contender alternately. The first step is a warm-up and not counted."""
    names = ["matrix", "lorry", *plan.rivals]
    num_tokens = round(plan.batch_size * plan.workload.num_tokens_per_row)
    options: dict[str, Any] = plan.options() | {"num_tokens": num_tokens}
    with ExitStack() as stack:
        started: list[Contender] = []
        contenders: list[Contender] = []
        for name in names:
            log = plan.folder / f"{name}-{threads}.log"
            contender = Contender(name, threads=threads, log=log, **options)
            started.append(stack.enter_context(closing(contender)))
        for contender in started:
            name = contender.name
            try:
                contender.step()
                contenders.append(contender)
            except RuntimeError as error:
                if name not in plan.rivals:
                    raise
                result.left_out[f"{name}, {threads} threads"] = str(error).strip().rpartition("\n")[2]
        for _ in range(plan.repeats):
            for contender in contenders:
                result.repeats.setdefault(f"{contender.name}_{threads}", []).append(contender.step())


def _conclude(plan: Plan, threads: int, result: Result) -> None:
    where = f"{threads} thread{'s' * (threads > 1)}"
    ours = result.repeats[f"lorry_{threads}"]
    matrix = result.repeats[f"matrix_{threads}"]
    result.find(f"Lorry, {where}", median_rate(ours), "tokens/s")
    for name in plan.rivals:
        if theirs := result.repeats.get(f"{name}_{threads}"):
            title = TITLES[name]
            result.find(f"{title[0].upper()}{title[1:]}, {where}", median_rate(theirs), "tokens/s")
            goal = GOAL_OVER_TRAINER if name == "peft_trainer" and threads == 1 else None
            result.find(f"Speedup over {title}, {where}", median_ratio(rates(ours), rates(theirs)), "x", goal=goal)
            by_cpu = [rates(reports, clock="cpu_seconds") for reports in (ours, theirs)]
            result.find(f"Speedup over {title}, {where}, by CPU time", median_ratio(*by_cpu), "x")
    needed = [4 * matrix[0]["parameters"] * rate for rate in rates(ours)]
    result.find(f"Matmul rate, {where}", median_of(matrix, "flops") / median_of(matrix, "seconds") / 1e9, "GFLOP/s")
    share = median_ratio(needed, rates(matrix, amount="flops"))
    result.find(
        f"Lorry's fraction of the matmul rate (4P FLOPs per token), {where}", share, "", goal=GOAL_OF_MATRIX_RATE
    )
