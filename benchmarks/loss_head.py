"""Memory and time of the output head with its loss for a large vocabulary: chunked against plain computation."""

from __future__ import annotations

from contextlib import ExitStack, closing

from benchmarks.gate import Contender
from benchmarks.plan import Plan
from benchmarks.results import Result, median_of, median_ratio

HEADS = {"chunked_head": "Lorry's chunked head", "plain_head": "Plain head"}


def run(plan: Plan) -> Result:
    options = {**plan.head, "dtype": plan.dtype}
    result = Result(theme="loss_head", settings=options | {"repeats": plan.repeats})
    with ExitStack() as stack:
        contenders = [
            stack.enter_context(closing(Contender(name, threads=1, log=plan.folder / f"{name}.log", **options)))
            for name in HEADS
        ]
        for contender in contenders:
            contender.step()
        for _ in range(plan.repeats):
            for contender in contenders:
                result.repeats.setdefault(contender.name, []).append(contender.step())
    _conclude(result)
    return result


def _conclude(result: Result) -> None:
    ours, theirs = (result.repeats[name] for name in HEADS)
    for name, title in HEADS.items():
        result.find(f"{title}: peak memory", median_of(result.repeats[name], "peak_bytes") / 1e6, "MB")
        result.find(f"{title}: time", median_of(result.repeats[name], "seconds"), "s")
    seconds = [[report["seconds"] for report in reports] for reports in (theirs, ours)]
    result.find("Speedup over the plain head", median_ratio(*seconds), "x")
