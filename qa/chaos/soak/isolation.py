"""A soak's test of isolation: two stretches of equal load, the ordinary project alone, then next to a noisy neighbor.

In both, the ordinary project submits more jobs than the workers finish, so that the processors are equally busy. No
faults are injected. `problems` compares the effects on other tenants: latency, lease renewals and shares.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import func, select

from api.settings import ApiSettings
from catalog.db.database import read_clock
from catalog.errors import LorryError
from catalog.jobs import commands
from catalog.pepper import Pepper
from catalog.states import FINAL_STATES, JobState
from catalog.tables.fleet import Worker
from catalog.tables.jobs import Job
from catalog.tables.usage import UsageDay
from catalog.webhooks import endpoints
from qa.chaos.service import FaultSite
from qa.chaos.soak.assessment import Compared
from qa.chaos.soak.tenants import read_samples
from tests.api.hook_receiver import Answer, Received, receiving
from tests.worker_site import PEPPER, ROOT

NAME = "neighbor"
MAX_RATIO = 2.0
"""Limit for the p99 of each kind of request next to the neighbor, relative to the p99 alone."""
MAX_RENEWAL = 1 / 3
"""Limit for the time between two heartbeats of a running worker, as a fraction of a lease."""
MIN_SHARE = 0.9
"""Minimum fraction of its fair share of device-seconds that a project must get while its jobs wait."""
MIN_SAMPLES = 100
"""Minimum number of samples in each stretch, because a p99 of fewer samples is unreliable."""
WATCH_SECONDS = 0.25
HOOK_SECONDS = 14.0
"""A webhook is given up after 15."""


@dataclass(kw_only=True, slots=True)
class Stretch:
    """One stretch. since, until: in seconds since 1970. gaps: by worker, the longest time between two heartbeats, in
    seconds. device_seconds: used in the stretch, by project."""

    since: float = 0.0
    until: float = 0.0
    gaps: dict[str, float] = field(default_factory=dict[str, float])
    device_seconds: dict[str, float] = field(default_factory=dict[str, float])
    num_waiting: int = 0
    """Jobs of the ordinary project that waited at the end."""

    @property
    def longest_gap(self) -> float:
        return max(self.gaps.values(), default=0.0)

    def share(self, project_id: str) -> float:
        """Return the project's fraction of all device-seconds."""
        used = sum(self.device_seconds.values())
        return self.device_seconds.get(project_id, 0.0) / used if used else 0.0


@dataclass(kw_only=True, slots=True)
class Isolated:
    """The measurements of both stretches. statuses: of the neighbor's requests, by behavior."""

    project_id: str = ""
    alone: Stretch = field(default_factory=Stretch)
    disturbed: Stretch = field(default_factory=Stretch)
    statuses: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    lease_seconds: float = 0.0


def problems(isolated: Isolated, compared: Sequence[Compared]) -> Iterator[str]:
    """Yield the effects of the neighbor on an ordinary tenant that exceed the limits. compared: requests of both
    stretches."""
    enough = [each for each in compared if min(each.calm.num, each.storm.num) >= MIN_SAMPLES]
    if not enough:
        yield f"no kind of request was answered {MIN_SAMPLES} times both alone and next to the neighbor"
    for each in enough:
        if each.ratio("p99") > MAX_RATIO:
            yield (
                f"{each.what}: p99 {each.storm.p99:.1f} ms next to the neighbor, {each.calm.p99:.1f} ms alone: "
                f"{each.ratio('p99'):.2f} times as long"
            )
    most = isolated.lease_seconds * MAX_RENEWAL
    for worker_id, seconds in isolated.disturbed.gaps.items():
        if seconds > most:
            yield f"{worker_id}: {seconds:.1f} s between two heartbeats, but a third of a lease is {most:.1f} s"
    if not isolated.disturbed.gaps:
        yield "no worker sent a heartbeat next to the neighbor"
    if not isolated.disturbed.num_waiting:
        yield "the ordinary project's queue was empty at the end, so its share is meaningless"
    num_projects = len(isolated.disturbed.device_seconds)
    share, fair = isolated.disturbed.share(isolated.project_id), 1 / max(1, num_projects)
    if num_projects < 2:
        yield "the neighbor used no device"
    if share < fair * MIN_SHARE:
        yield f"the ordinary project got {share:.1%} of the device-seconds, but its fair share is {fair:.1%}"


class Neighborhood:
    """Runs both stretches. `wait(until)` of the soak keeps its processes running meanwhile."""

    def __init__(self, site: FaultSite, wait: Callable[[Callable[[], object]], None]) -> None:
        self.site = site
        self.wait = wait
        self.found = Isolated(project_id=site.caller.project_id, lease_seconds=site.settings.lease_seconds)

    def measure(self, stretch: Stretch, *, seconds: float, warm_seconds: float) -> None:
        """Measure a stretch. warm_seconds: the time at the beginning that is not measured."""
        began = time.time()
        self.wait(lambda: time.time() < began + warm_seconds)
        used_before = self._device_seconds()
        with self._watching_heartbeats(stretch):
            stretch.since = time.time()
            self.wait(lambda: time.time() < began + seconds)
            stretch.until = time.time()
        used = self._device_seconds()
        stretch.device_seconds = {
            name: seconds - used_before.get(name, 0.0)
            for name, seconds in used.items()
            if seconds > used_before.get(name, 0.0)
        }
        stretch.num_waiting = self._num_waiting()

    @contextmanager
    def separate_machines(self, workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
        """Reserve the first processor for the API server and its databases during the block. Workers with all their
        processes don't use it, nor does this process, which is the S3 server and receives webhooks.

        In production they run on other machines. Here, a process of the service that wakes up would wait for the end of
        a trainer's time slice, dozens of times in each request, which would dominate the measurement.
        """
        every = os.sched_getaffinity(0)
        try:
            _use_processors_of_all(workers, _elsewhere())
            _use_processors(os.getpid(), _elsewhere())
            yield
        finally:
            _use_processors(os.getpid(), every)
            _use_processors_of_all(workers, every)

    @contextmanager
    def neighbor(self) -> Iterator[None]:
        """Run the misbehaving tenant during the block. Its jobs are cancelled afterwards."""
        project_id, key = self._create()
        folder = self.site.folder / NAME
        folder.mkdir()
        path = folder / "samples.jsonl"
        with receiving() as receiver:
            receiver.answer = self._answer_late
            argv = [sys.executable, "-m", "qa.chaos.soak.tenants", "noisy", self.site.url, key, str(path), receiver.url]
            client = subprocess.Popen(argv, stdin=subprocess.PIPE, cwd=ROOT)
            _use_processors(client.pid, _elsewhere())
            try:
                yield
            finally:
                client.communicate(timeout=180)
        for sample in read_samples(path):
            self.found.statuses[sample.what][f"{sample.status} {sample.told}".strip()] += 1
        self._cancel_all(project_id)
        self._disable_endpoints(project_id)

    def _answer_late(self, request: Received) -> Answer:
        time.sleep(HOOK_SECONDS)
        self.site.heard(request.body, event_id=request.headers["webhook-id"])
        return Answer()

    def _create(self) -> tuple[str, str]:
        """Create the neighbor's project, which may submit urgent jobs. Returns its id and the secret of its key.

        The key has the default rate limit. The soak's own clients have none.
        """
        made = self.site.ask("POST", "/v1/projects", json={"name": NAME})
        assert made.status_code == 200, made.text
        limited = self.site.ask("POST", f"/v1/projects/{NAME}/limits", json={"highest_priority": "urgent"})
        assert limited.status_code == 200, limited.text
        limit = ApiSettings.model_fields["requests_per_minute"].default
        wanted = {"name": NAME, "project": NAME, "highest_priority": "urgent", "requests_per_minute": limit}
        key = self.site.ask("POST", "/v1/api_keys", json=wanted)
        assert key.status_code == 200, key.text
        return made.json()["id"], key.json()["value"]

    def _cancel_all(self, project_id: str) -> None:
        def unfinished() -> list[str]:
            with self.site.db.read() as session:
                found = select(Job.id).where(Job.project_id == project_id, Job.state.not_in(FINAL_STATES))
                return list(session.scalars(found))

        for job_id in unfinished():
            try:
                commands.cancel(self.site.db, project_id=project_id, job_id=job_id)
            except LorryError:
                continue  # it has finished meanwhile
        self.wait(unfinished)

    def _disable_endpoints(self, project_id: str) -> None:
        """Disable the neighbor's webhook endpoints, so that nothing is delivered to them any more."""
        changes, pepper = endpoints.EndpointChange(enabled=False), Pepper(current=PEPPER.encode())
        for endpoint in endpoints.list_page(self.site.db, project_id=project_id, after=None, limit=100).items:
            given = {"project_id": project_id, "endpoint_id": endpoint.id, "changes": changes, "pepper": pepper}
            endpoints.change(self.site.db, **given)

    def _device_seconds(self) -> dict[str, float]:
        total = select(UsageDay.project_id, func.sum(UsageDay.device_seconds)).group_by(UsageDay.project_id)
        with self.site.db.read() as session:
            return {row[0]: float(row[1]) for row in session.execute(total)}

    def _num_waiting(self) -> int:
        states = (JobState.VALIDATING_FILES, JobState.QUEUED)
        waiting = select(func.count()).where(Job.project_id == self.site.caller.project_id, Job.state.in_(states))
        with self.site.db.read() as session:
            return session.scalar(waiting) or 0

    @contextmanager
    def _watching_heartbeats(self, stretch: Stretch) -> Iterator[None]:
        """Measure the longest time between two heartbeats of each running worker, by the database's clock."""
        is_over = threading.Event()
        live = select(Worker.id, Worker.heartbeat_at).where(Worker.ended_at.is_(None))

        def watch() -> None:
            seen: dict[str, float] = {}
            while not is_over.wait(WATCH_SECONDS):
                with self.site.db.read() as session:
                    now = read_clock(session)
                    rows: list[Any] = [*session.execute(live)]
                for worker_id, heartbeat_at in rows:
                    if worker_id in seen:
                        is_due = heartbeat_at == seen[worker_id]  # the next one counts before it arrives
                        gap = (now if is_due else heartbeat_at) - seen[worker_id]
                        stretch.gaps[worker_id] = max(gap, stretch.gaps.get(worker_id, 0.0))
                    seen[worker_id] = heartbeat_at

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


def _elsewhere() -> set[int]:
    """Return all processors except the first one, or the only processor."""
    mine = os.sched_getaffinity(0)
    return mine - {min(mine)} or mine


def _use_processors_of_all(workers: Sequence[subprocess.Popen[bytes]], processors: set[int]) -> None:
    for worker in workers:
        try:
            processes = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for process in processes:
            _use_processors(process.pid, processors)


def _use_processors(pid: int, processors: set[int]) -> None:
    """Pin each thread of a process. Threads and processes that they start later inherit this."""
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), processors)
