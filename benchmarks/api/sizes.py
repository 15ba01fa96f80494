"""Ratio of response times of pages and claims with a million jobs stored to those with ten thousand."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from statistics import median
from urllib.parse import urlsplit

from benchmarks.api.plan import TITLES, ApiPlan
from benchmarks.api.seeding import fill
from benchmarks.api.service import Served, api, place, servers
from benchmarks.results import Result
from catalog.fleet import metrics
from catalog.lifecycle import recording
from tests.catalog.world import WIDE, World

GOAL_RATIO = 2.0
ONE = replace(WIDE, max_jobs=1)
WAITING = 300
NO_GOAL = ("job counts for the metrics",)
"""Counts of waiting and running jobs, for monitoring, which reads them a few times per minute."""
JOBS = "/v1/fine_tuning/jobs"


def run(plan: ApiPlan) -> Result:
    result = Result(theme="api_size", settings=plan.settings())
    sizes = {"few": plan.few_jobs, "many": plan.many_jobs}
    with servers(plan.databases) as server:
        for kind in plan.databases:
            with ExitStack() as stack:
                places = {name: stack.enter_context(place(kind, server, plan.folder, name)) for name in sizes}
                worlds = {name: stack.enter_context(where.world()) for name, where in places.items()}
                ids = {name: _filled(plan, result, kind, worlds[name], number) for name, number in sizes.items()}
                served = {name: stack.enter_context(api(places[name], worlds[name], core=plan.core)) for name in sizes}
                sides = {
                    name: stack.enter_context(closing(Side(worlds[name], served[name], ids[name]))) for name in sizes
                }
                _compare(plan, result, kind, sides)
    return result


class Side:
    """One of two databases, and a client of the API server on it."""

    def __init__(self, world: World, served: Served, ids: dict[str, str]) -> None:
        self.world, self._ids = world, ids
        address = urlsplit(served.url)
        self._connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
        self._headers = {"authorization": f"Bearer {served.key}"}

    def close(self) -> None:
        self._connection.close()

    def ask(self, path: str) -> None:
        self._connection.request("GET", path.format(**self._ids), headers=self._headers)
        answer = self._connection.getresponse()
        content = answer.read()
        assert answer.status == 200, (path, answer.status, content[:300])
        assert json.loads(content)


def _filled(plan: ApiPlan, result: Result, kind: str, world: World, num_jobs: int) -> dict[str, str]:
    began = time.perf_counter()
    ids = fill(world, num_jobs=num_jobs, num_points=num_jobs * plan.points_a_job)
    report = {"jobs": num_jobs, "seconds": time.perf_counter() - began}
    result.repeats.setdefault(f"{kind}, filling", []).append(report)
    long = _long(world, plan.long_steps)
    world.flood(world.queued(), WAITING)
    return ids | {"long": long}


def _long(world: World, num_steps: int) -> str:
    """Create a running job with a long curve."""
    claim = world.running(suffix="long")
    for first in range(1, num_steps + 1, 5000):
        steps = range(first, min(first + 5000, num_steps + 1))
        points = [{"kind": "train", "step": step, "loss": 1 + 1 / step, "learning_rate": 1e-4} for step in steps]
        recording.record_metrics(world.db, claim.claim_id, points)
    return claim.job.id


def _acts(side: Side) -> dict[str, Callable[[], object]]:
    def page(path: str) -> Callable[[], object]:
        return lambda: side.ask(path)

    return {
        "first page of jobs": page(f"{JOBS}?limit=20"),
        "middle page of jobs": page(f"{JOBS}?limit=20&after={{job}}"),
        "page of files": page("/v1/files?limit=20"),
        "page of adapters": page("/v1/adapters?limit=20"),
        "one job": page(f"{JOBS}/{{job}}"),
        "events of a job": page(f"{JOBS}/{{job}}/events"),
        "checkpoints of a job": page(f"{JOBS}/{{job}}/checkpoints"),
        "loss curve of a job": page(f"{JOBS}/{{job}}/metrics"),
        "long loss curve": page(f"{JOBS}/{{long}}/metrics?max_points=2000"),
        "reason why a job waits": page(f"{JOBS}/{{long}}/why"),
        "queue": page("/v1/queue"),
        "workers": page("/v1/workers"),
        "claim of a job": lambda: side.world.claim("w1", ONE),
        "job counts for the metrics": lambda: metrics.read(side.world.db),
    }


def _compare(plan: ApiPlan, result: Result, kind: str, sides: dict[str, Side]) -> None:
    """Measure both sides alternately. Ratios are of medians, because a database checkpoint may disturb a request."""
    acts = {name: _acts(side) for name, side in sides.items()}
    for what in acts["few"]:
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for look in range(plan.looks + 2):
            for name in sides:
                began = time.perf_counter()
                acts[name][what]()
                if look > 1:  # the first ones read from disk and create query plans
                    seconds[name].append(time.perf_counter() - began)
        result.repeats[f"{kind}, {what}"] = [
            {name: took[i] for name, took in seconds.items()} for i in range(plan.looks)
        ]
        few, many = median(seconds["few"]), median(seconds["many"])
        at_most = None if what in NO_GOAL else GOAL_RATIO
        result.find(f"{TITLES[kind]}: {what}", many / few, f"x of {few * 1000:.1f} ms", at_most=at_most)
