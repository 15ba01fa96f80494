"""Job creations and reads a second of one api process on one core, and how long a creation takes at half of that."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.api import load
from benchmarks.api.plan import ApiPlan
from benchmarks.api.service import Place, Served, api, place, servers
from benchmarks.results import Result, median_of, rates

GOAL_CREATIONS, GOAL_READS, GOAL_P99_SECONDS = 1000.0, 3000.0, 0.05
CREATION = "/v1/fine_tuning/jobs"


def run(plan: ApiPlan) -> Result:
    """The databases take turns; an empty queue is filled meanwhile, by some thousand jobs."""
    result = Result(theme="api_rates", settings=plan.settings())
    with servers(plan.databases) as server:
        _run(plan, result, server, list(plan.databases))
    for kind in plan.databases:
        is_goal = kind == "postgresql"
        for what, goal in (("creations", GOAL_CREATIONS), ("reads", GOAL_READS), ("lists", None)):
            reports = result.repeats[f"{kind} {what}"]
            figure = sorted(rates(reports, amount="requests"))[len(reports) // 2]
            result.find(f"{kind}, {what} a second", figure, "/s", goal=goal if is_goal or what == "reads" else None)
            busy = median_of(reports, "api_cpu_seconds") / median_of(reports, "seconds")
            result.find("  of its core, the api used", busy, "of a core")
        late = median_of(result.repeats[f"{kind} creations at half"], "p99_seconds")
        result.find(
            f"{kind}, p99 of a creation at half that rate", late, "s", at_most=GOAL_P99_SECONDS if is_goal else None
        )
    return result


def _run(plan: ApiPlan, result: Result, server: str | None, kinds: Sequence[str]) -> None:
    """Each database's service is open while the others are measured: idle, it takes next to nothing."""
    if not kinds:
        return
    kind, *others = kinds
    with place(kind, server, plan.folder, "rates") as where:
        world = where.world()
        job = world.submit()
        with api(where, world, core=plan.core) as served:
            for _ in range(plan.repeats):
                _turn(plan, result, where, served, {"job": job.id, "file": world.file_id})
    _run(plan, result, server, others)


def _turn(plan: ApiPlan, result: Result, where: Place, served: Served, ids: dict[str, str]) -> None:
    def measured(what: str, method: str, path: str, **given: object) -> dict[str, float]:
        before = served.cpu_seconds()
        asked = load.Load(
            url=served.url,
            key=served.key,
            method=method,
            paths=[path],
            connections=plan.connections,
            seconds=plan.seconds,
            **given,  # pyright: ignore[reportArgumentType]
        )
        report = load.run(asked) | {"api_cpu_seconds": served.cpu_seconds() - before}
        assert not report["refused"], report
        result.repeats.setdefault(f"{where.kind} {what}", []).append(report)
        return report

    body = {"model": "smol", "training_file": ids["file"]}
    created = measured("creations", "POST", CREATION, body=body)
    half = created["requests"] / created["seconds"] / 2
    measured("creations at half", "POST", CREATION, body=body, rate=half)
    measured("reads", "GET", f"{CREATION}/{ids['job']}")
    measured("lists", "GET", f"{CREATION}?limit=20")
