"""Fifty workers that concurrently claim one job at a time until the queue is empty: claims per second, no job twice."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from benchmarks.api.plan import TITLES, ApiPlan
from benchmarks.api.service import place, servers
from benchmarks.results import Result, rates
from catalog.db.database import Database
from catalog.queue import claiming
from tests.catalog.world import LEASE, WIDE, World

GOAL_CLAIMS = 500.0
ONE = replace(WIDE, max_jobs=1)


def run(plan: ApiPlan) -> Result:
    result = Result(theme="api_claims", settings=plan.settings())
    with servers(plan.databases) as server:
        for kind in plan.databases:
            reports: list[dict[str, Any]] = []
            for entry in range(plan.repeats):
                with place(kind, server, plan.folder, f"claims{entry}") as where:
                    with where.world() as world:
                        _fill_the_queue(plan, world)
                    reports.append(_empty_the_queue(plan, where.url))
            result.repeats[kind] = reports
            figure = sorted(rates(reports, amount="claims"))[len(reports) // 2]
            goal = GOAL_CLAIMS if kind == "postgresql" else None
            result.find(f"{TITLES[kind]}: claims per second, {plan.workers} workers", figure, "/s", goal=goal)
    return result


def _fill_the_queue(plan: ApiPlan, world: World) -> None:
    job = world.queued()
    world.flood(job, plan.waiting - 1)
    for number in range(plan.workers):
        world.worker(f"w{number}")


def _empty_the_queue(plan: ApiPlan, url: str) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")  # starting fifty interpreters would take longer than the claims
    go, claimed = context.Event(), context.SimpleQueue()
    processes = [context.Process(target=_claim, args=(url, f"w{i}", go, claimed)) for i in range(plan.workers)]
    for process in processes:
        process.start()
    for _ in processes:
        assert claimed.get() == "ready"
    began = time.perf_counter()
    go.set()
    got: list[list[str]] = [claimed.get() for _ in processes]
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    each = _flat(got)
    assert len(each) == len(set(each)) == plan.waiting, (len(each), len(set(each)))
    return {"claims": len(each), "seconds": seconds, "fewest": min(map(len, got)), "most": max(map(len, got))}


def _claim(url: str, worker_id: str, go: Any, claimed: Any) -> None:
    db = Database(url)
    with db.read():
        claimed.put("ready")
    go.wait()
    got: list[str] = []
    given = {"capacity": ONE, "lease_seconds": LEASE * 10, "trainer_id": f"trainer-{worker_id}"}
    while some := claiming.claim_pack(db, worker_id=worker_id, **given):
        got += [claim.job.id for claim in some]
    db.close()
    claimed.put(got)


def _flat(lists: Iterable[list[str]]) -> list[str]:
    return [one for some in lists for one in some]
