"""A soak's test of isolation: two stretches of equal load, the ordinary project alone, then next to a noisy neighbor.

In both, the ordinary project submits more jobs than the workers finish, so that the processors are equally busy. No
faults are injected. The effects on other tenants are assessed: latency, lease renewals and shares.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from api.settings import ApiSettings
from catalog.db.database import read_clock
from catalog.errors import LorryError
from catalog.jobs import commands
from catalog.pepper import Pepper
from catalog.states import FINAL_STATES, JobState
from catalog.tables.fleet import Worker
from catalog.tables.jobs import Job
from catalog.tables.tenancy import UsageDay
from catalog.webhooks import endpoints
from qa.chaos.service import FaultSite, children_of
from qa.chaos.soak.assessment import Isolated, Stretch
from qa.chaos.soak.tenants import read_samples
from tests.api.hook_receiver import Answer, Received, receiving
from tests.worker_site import PEPPER, ROOT

NAME = "neighbor"
WATCH_SECONDS = 0.25
HOOK_SECONDS = 14.0
"""A webhook is given up after 15."""


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
            since = time.time()
            self.wait(lambda: time.time() < began + seconds)
            stretch.span = since, time.time()
        used = {name: total - used_before.get(name, 0.0) for name, total in self._device_seconds().items()}
        stretch.device_seconds = {name: seconds for name, seconds in used.items() if seconds > 0}
        waits = Job.state.in_((JobState.VALIDATING_FILES, JobState.QUEUED))
        with self.site.db.read() as session:
            stretch.num_waiting = session.query(Job).where(Job.project_id == self.found.project_id, waits).count()

    @contextmanager
    def separate_machines(self, workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
        """Reserve the first processor for the API server and its databases during the block. Workers with all their
        processes don't use it, nor does this process, which is the S3 server and receives webhooks.

        In production they run on other machines. Here, a process of the service that wakes up would wait for the end of
        a trainer's time slice, dozens of times in each request, which would dominate the measurement.
        """
        every = os.sched_getaffinity(0)
        try:
            _use_processors(_elsewhere(), os.getpid(), *_pids_of(workers))
            yield
        finally:
            _use_processors(every, os.getpid(), *_pids_of(workers))

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
            _use_processors(_elsewhere(), client.pid)
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
        return self.site.heard(request)

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


def _pids_of(workers: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [pid for worker in workers for pid in (worker.pid, *(child.pid for child in children_of(worker)))]


def _use_processors(processors: set[int], *pids: int) -> None:
    """Pin each thread of the processes. Threads and processes that they start later inherit this."""
    for thread in (path for pid in pids for path in Path(f"/proc/{pid}/task").glob("*")):
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), processors)
