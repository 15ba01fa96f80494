"""Keeps the processes of the soak's service running: it restarts each process that exits, as systemd or Compose do.

It also acts as an operator that uncordons workers. Killed trainers make their nodes look faulty.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

import httpx
import psutil
from sqlalchemy import select

from catalog.errors import LorryError
from catalog.tables.fleet import Worker
from qa.chaos.faults.backends import CELERY
from qa.chaos.service import FaultSite
from qa.chaos.soak.tenants import Sample

FAILPOINTS = (
    *("before_claim", "after_claim", "uploading", "before_complete", "in_complete", "after_complete"),
    *("loading", "step_20", "step_75", "step_130", "in_checkpoint"),
    *("submit_before_commit", "submit_after_commit"),
)
"""A fault can make the next process that passes one kill itself."""
OPERATOR_SECONDS = 2.0
"""Interval at which cordoned workers are uncordoned."""
Away = Literal["api", "database"]


@dataclass(kw_only=True, slots=True)
class Window:
    """A period in which the API server or its database was unavailable, in seconds since 1970. until None: it still
    is."""

    what: Away
    since: float
    until: float | None = None

    def overlaps(self, since: float, until: float) -> bool:
        return since < (self.until or float("inf")) and until > self.since


class Kept:
    """Celery workers and the API server. `tick` must be called continuously."""

    def __init__(self, site: FaultSite, num_workers: int) -> None:
        self.site = site
        self.workers: list[subprocess.Popen[bytes]] = []
        self.windows: list[Window] = []
        self.started: Counter[str] = Counter()
        """Number of restarts, by the kind of process and its exit status."""
        self.answers: list[Sample] = []
        """Responses to the requests that uncordon workers."""
        self._names = 0
        self._api_lived_at = time.time()
        self._leaving: subprocess.Popen[bytes] | None = None
        self._looked_at = 0.0
        self._armed = ",".join(f"{name}:kill-if={site.gate(name)}" for name in FAILPOINTS)
        self.start_api()
        for _ in range(num_workers):
            self.workers.append(self._start_worker())

    def tick(self) -> None:
        for place, worker in enumerate(self.workers):
            if worker.poll() is not None:
                self.started[f"worker, status {worker.returncode}"] += 1
                self.workers[place] = self._start_worker()
        self._keep_api()
        if time.monotonic() - self._looked_at > OPERATOR_SECONDS:
            self._looked_at = time.monotonic()
            self._uncordon()

    def is_away(self, what: Away) -> bool:
        return any(window.what == what and window.until is None for window in self.windows)

    def opens(self, what: Away, *, since: float | None = None) -> None:
        if not self.is_away(what):
            self.windows.append(Window(what=what, since=time.time() if since is None else since))

    def closes(self, what: Away) -> None:
        for window in self.windows:
            if window.what == what and window.until is None:
                window.until = time.time()

    def start_api(self) -> None:
        """Start the API server without waiting. `tick` detects when it answers."""
        self.opens("api", since=self._api_lived_at)
        self.site.begin_api(FAILPOINT=self._armed)

    def end_api(self, *, is_killed: bool) -> None:
        """Kill or terminate the API server. It counts as unavailable from now on, although it may still answer for a
        while after SIGTERM."""
        assert self.site.api is not None
        self.opens("api")
        self._leaving = self.site.api
        if is_killed:
            self._leaving.kill()
        else:
            self._leaving.terminate()

    def processes_of(self, worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Return a worker's processes, except its trainers."""
        trainers = {each.pid for each in self.trainers_of(worker)}
        return [psutil.Process(worker.pid), *(p for p in self._children_of(worker) if p.pid not in trainers)]

    def trainers_of(self, worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
        return [child for child in self._children_of(worker) if _is_trainer(child)]

    def _children_of(self, worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
        try:
            return psutil.Process(worker.pid).children(recursive=True)
        except psutil.Error:
            return []

    def _start_worker(self) -> subprocess.Popen[bytes]:
        self._names += 1
        settings = ["--without-gossip", "--without-mingle", "-c", "1", "-Q", "lorry", "-l", "warning"]
        argv = [*CELERY, "worker", *settings, "-n", f"w{self._names}@%h"]
        return self.site.start(argv, LORRY_DEVICE="cpu", FAILPOINT=self._armed)

    def _keep_api(self) -> None:
        api = self.site.api
        assert api is not None
        if api.poll() is not None:
            self.started[f"api, status {api.returncode}"] += 1
            self.start_api()
            return
        self._api_lived_at = time.time()
        if self.is_away("api") and api is not self._leaving and self._api_answers():
            self.closes("api")

    def _api_answers(self) -> bool:
        try:
            return self.site.ask("GET", "/healthz", timeout=1.0).status_code == 200
        except httpx.TransportError:
            return False

    def _uncordon(self) -> None:
        cordoned = select(Worker.id).where(Worker.cordon.is_not(None), Worker.ended_at.is_(None))
        try:
            with self.site.db.read() as session:
                ids = list(session.scalars(cordoned))
            for worker_id in ids:
                path = f"/v1/workers/{worker_id}/uncordon"
                self.answers.append(timed("uncordon", lambda path=path: self.site.ask("POST", path, timeout=10.0)))
        except (LorryError, httpx.TransportError):
            return  # the next poll finds them


def timed(what: str, ask: Callable[[], httpx.Response]) -> Sample:
    """Send and measure one request of the operator."""
    began, at = time.monotonic(), time.time()
    answer = ask()
    told = "" if answer.status_code < HTTPStatus.BAD_REQUEST else _code(answer)
    advice = answer.headers.get("retry-after")
    seconds = time.monotonic() - began
    return Sample(what=what, at=at, seconds=seconds, status=answer.status_code, retry_after=advice, told=told)


def _code(answer: httpx.Response) -> str:
    try:
        return str((answer.json().get("error") or {}).get("code"))
    except ValueError:
        return answer.text[:100]


def _is_trainer(process: psutil.Process) -> bool:
    try:
        return "worker.children.trainer.main" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
