"""Job creations and reads per second of one API server on one core, and the latency of a creation at half that rate.

The framework alone is measured alternately for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.api import load
from benchmarks.api.bare import A_ROW, CONSTANT, IN_A_THREAD
from benchmarks.api.plan import TITLES, ApiPlan
from benchmarks.api.service import Place, Served, api, peer, place, servers
from benchmarks.results import Result, median_of, rates

GOAL_CREATIONS, GOAL_READS, GOAL_P99_SECONDS = 1000.0, 3000.0, 0.05
CREATION = "/v1/fine_tuning/jobs"
RATES = {"creations": "jobs created per second", "reads": "jobs read per second", "lists": "job lists per second"}
GOALS = {"creations": GOAL_CREATIONS, "reads": GOAL_READS}
PEERS = {"a constant": CONSTANT, "a constant from a thread": IN_A_THREAD, "a row from a thread": A_ROW}


def run(plan: ApiPlan) -> Result:
    """Alternate between the databases. The queue fills up by several thousand jobs meanwhile."""
    result = Result(theme="api_rates", settings=plan.settings())
    with servers(plan.databases) as server:
        _run(plan, result, server, list(plan.databases))
    for kind in plan.databases:
        _find(result, kind)
    return result


def _find(result: Result, kind: str) -> None:
    is_goal = kind == "postgresql"
    for what, title in RATES.items():
        name, goal = f"{TITLES[kind]}: {title}", GOALS.get(what)
        reports = result.repeats[f"{kind} {what}"]
        figure = sorted(rates(reports, amount="requests"))[len(reports) // 2]
        result.find(name, figure, "/s", goal=goal if is_goal or what == "reads" else None)
        busy = median_of(reports, "api_cpu_seconds") / median_of(reports, "seconds")
        result.find(f"{name}, fraction of a core used by the API server", busy, "of a core")
    late = median_of(result.repeats[f"{kind} creations at half"], "p99_seconds")
    name = f"{TITLES[kind]}: p99 latency of a job creation, at half of the measured rate"
    result.find(name, late, "s", at_most=GOAL_P99_SECONDS if is_goal else None)
    for what in PEERS:
        reports = result.repeats[f"{kind} FastAPI alone, {what}"]
        figure = sorted(rates(reports, amount="requests"))[len(reports) // 2]
        result.find(f"{TITLES[kind]}: FastAPI alone, {what}, requests per second", figure, "/s")


def _run(plan: ApiPlan, result: Result, server: str | None, kinds: Sequence[str]) -> None:
    """Keep each database's server running while the others are measured, since it takes almost no time when idle."""
    if not kinds:
        return
    kind, *others = kinds
    with place(kind, server, plan.folder, "rates") as where, where.world() as world:
        job = world.submit()
        with api(where, world, core=plan.core) as served, peer(where, core=plan.core) as bare:
            for _ in range(plan.repeats):
                _turn(plan, result, where, served, {"job": job.id, "file": world.file_id})
                for what, path in PEERS.items():
                    _measured(plan, result, f"{kind} FastAPI alone, {what}", bare, path.format(job_id=job.id))
    _run(plan, result, server, others)


def _turn(plan: ApiPlan, result: Result, where: Place, served: Served, ids: dict[str, str]) -> None:
    body = {"model": "smol", "training_file": ids["file"]}
    created = _measured(plan, result, f"{where.kind} creations", served, CREATION, method="POST", body=body)
    half = created["requests"] / created["seconds"] / 2
    _measured(plan, result, f"{where.kind} creations at half", served, CREATION, method="POST", body=body, rate=half)
    _measured(plan, result, f"{where.kind} reads", served, f"{CREATION}/{ids['job']}")
    _measured(plan, result, f"{where.kind} lists", served, f"{CREATION}?limit=20")


def _measured(
    plan: ApiPlan, result: Result, what: str, served: Served, path: str, *, method: str = "GET", **given: object
) -> dict[str, float]:
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
    result.repeats.setdefault(what, []).append(report)
    return report
