"""Ten thousand listeners on one API server: the delay from the commit of an event until the last of them receives it.

`python -m benchmarks.api.listeners` is the listening process, which reads requests as lines of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from benchmarks.api.plan import TITLES, ApiPlan
from benchmarks.api.service import Served, api, place, servers
from benchmarks.results import Result, median_of
from benchmarks.workload import ROOT
from catalog.lifecycle import recording
from tests.catalog.world import World

GOAL_SECONDS = 1.0
TOGETHER = 100
"""Connections that are opened concurrently."""
PATIENCE_SECONDS = 240.0
HOURS = 6 * 3600.0


def run(plan: ApiPlan) -> Result:
    """Measure with all listeners on one job, and with a hundred jobs, one of which has the event."""
    result = Result(theme="api_listeners", settings=plan.settings())
    with servers(plan.databases) as server:
        for kind in plan.databases:
            with place(kind, server, plan.folder, "listeners") as where, where.world() as world:
                world.worker()
                world.queued()
                (running,) = world.claim(lease=HOURS)  # long, because the API server ends expired leases
                others = [world.submit().id for _ in range(min(99, plan.listeners // 2))]
                with api(where, world, core=plan.core) as served:
                    for name, jobs in (("one job", [running.job.id]), ("many jobs", [running.job.id, *others])):
                        report = _listen(plan, served, world, running.claim_id, jobs)
                        result.repeats[f"{kind}, {name}"] = report["marks"]
                        result.repeats[f"{kind}, {name}, opening"] = [report["opening"]]
                        last = median_of(report["marks"], "last_seconds")
                        clients = f"event to the last of {plan.listeners:,} clients, streams of {name}"
                        result.find(f"{TITLES[kind]}: {clients}", last, "s", at_most=GOAL_SECONDS)
    return result


def _listen(plan: ApiPlan, served: Served, world: World, claim_id: str, jobs: list[str]) -> dict[str, Any]:
    told = {"url": served.url, "key": served.key, "jobs": jobs, "listeners": plan.listeners}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.api.listeners"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    answers = process.stdout

    def say(message: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(message), file=process.stdin, flush=True)
        return json.loads(answers.readline())

    try:
        opening = say(told) | {"api_memory_bytes": _memory(served.pid)}
        marks: list[dict[str, Any]] = []
        for number in range(plan.marks):
            mark = f"mark {number} of {os.getpid()} {len(jobs)}"
            began = time.time()
            recording.record_event(world.db, claim_id, "info", mark)
            committed = time.time()
            marks.append(say({"mark": mark, "committed": committed}) | {"write_seconds": committed - began})
        return {"opening": opening, "marks": marks}
    finally:
        process.stdin.close()
        process.wait(PATIENCE_SECONDS)
        answers.close()


def _memory(pid: int) -> int:
    import psutil

    return psutil.Process(pid).memory_info().rss


class _Listener(asyncio.Protocol):
    """One connection, which records when it receives a mark."""

    def __init__(self, listeners: _Listeners, path: str) -> None:
        self.listeners, self.path = listeners, path
        self.last = b""
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        head = f"GET {self.path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {self.listeners.key}\r\n\r\n"
        transport.write(head.encode())
        self.listeners.transports.append(transport)

    def data_received(self, data: bytes) -> None:
        if not self.is_open and b"event: job" in data:
            self.is_open = True
            self.listeners.opened.release()
        if b"mark" in data:
            self.listeners.heard.append((time.time(), data))
            self.listeners.news.set()


class _Listeners:
    def __init__(self, told: dict[str, Any]) -> None:
        self.key: str = told["key"]
        self.told = told
        self.opened = asyncio.Semaphore(0)
        self.heard: list[tuple[float, bytes]] = []
        self.news = asyncio.Event()
        self.transports: list[asyncio.Transport] = []

    async def open(self) -> dict[str, Any]:
        began, address, jobs = time.time(), urlsplit(self.told["url"]), self.told["jobs"]
        loop = asyncio.get_running_loop()
        for first in range(0, self.told["listeners"], TOGETHER):
            numbers = range(first, min(first + TOGETHER, self.told["listeners"]))
            for number in numbers:
                path = f"/v1/fine_tuning/jobs/{jobs[number % len(jobs)]}/stream"
                await loop.create_connection(lambda path=path: _Listener(self, path), address.hostname, address.port)
            for _ in numbers:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await self.opened.acquire()
        return {"listeners": len(self.transports), "seconds": time.time() - began}

    async def hear(self, mark: str, committed: float) -> dict[str, Any]:
        """Return the seconds from the commit until the first, median and last listener of the job got the mark."""
        wanted = len(range(0, self.told["listeners"], len(self.told["jobs"])))
        times: list[float] = []
        while len(times) < wanted:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await self.news.wait()
            await asyncio.sleep(0)
            self.news.clear()
            heard, self.heard = self.heard, []
            times += [at - committed for at, data in heard if mark.encode() in data]
        times.sort()
        return {
            "listeners": len(times),
            "first_seconds": times[0],
            "middle_seconds": times[len(times) // 2],
            "last_seconds": times[-1],
        }


async def main() -> None:
    loop = asyncio.get_running_loop()
    listeners = _Listeners(json.loads(await loop.run_in_executor(None, sys.stdin.readline)))
    print(json.dumps(await listeners.open()), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await listeners.hear(**json.loads(line))), flush=True)
    for transport in listeners.transports:
        transport.abort()


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(main())
