"""The processes of the soak's service, and the faults that are injected into them.

The faults are drawn from a seed before the first one, so that a run can be repeated. The target of a fault is drawn as
a position among the targets that exist at its time; a fault without a target is counted separately. Exited processes
are restarted, as systemd or Compose do. Nothing here waits: `tick` must be called continuously.
"""

from __future__ import annotations

import random
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import psutil
import redis
from sqlalchemy import select

from catalog.errors import LorryError
from catalog.states import JobState
from catalog.tables.fleet import Worker
from catalog.tables.jobs import Job
from qa.chaos.faults.backends import CELERY
from qa.chaos.faults.storage import BROKEN
from qa.chaos.service import FaultSite, children_of, is_trainer
from qa.chaos.soak.tenants import JOBS, Client

FAILPOINTS = (
    *("before_claim", "after_claim", "uploading", "before_complete", "in_complete", "after_complete"),
    *("loading", "step_20", "step_75", "step_130", "in_checkpoint"),
    *("submit_before_commit", "submit_after_commit"),
)
"""A fault can make the next process that passes one kill itself."""
OPERATOR_SECONDS = 2.0
"""Interval at which an operator uncordons workers. Killed trainers make their nodes look faulty."""
AGAIN_SECONDS = 1.0
GAP_SECONDS = (2.0, 6.0)
"""Minimum and maximum time between two faults."""
KINDS: dict[str, tuple[int, float, float]] = {
    "trainer-killed": (7, 0.0, 0.0),
    "trainer-stopped": (5, 1.0, 20.0),
    "worker-killed": (6, 0.0, 0.0),
    "worker-stopped": (5, 1.0, 30.0),  # half of them longer than a lease
    "worker-drained": (5, 0.0, 0.0),
    "failpoint": (10, 0.0, 0.0),
    "job-paused": (10, 1.0, 12.0),
    "api-killed": (3, 0.0, 0.0),
    "api-restarted": (3, 0.0, 0.0),
    "redis-flushed": (4, 0.0, 0.0),
    "redis-restarted": (3, 0.5, 8.0),
    "postgres-restarted": (3, 0.5, 5.0),
    "postgres-killed": (2, 0.0, 2.0),
    "store-failing": (5, 2.0, 10.0),
}
"""By kind: the weight, and the minimum and maximum seconds until it is reverted. `Storm` has a method for each."""
T = TypeVar("T")
Away = Literal["api", "database"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A fault. at: seconds after the faults begin. place: in [0, 1), the position of its target among all targets."""

    at: float
    kind: str
    place: float
    lasts: float = 0.0
    failpoint: str | None = None


def draw(seed: int, *, seconds: float) -> list[Fault]:
    """Return all faults of a run, in their order."""
    choose = random.Random(seed)
    faults: list[Fault] = []
    at = choose.uniform(*GAP_SECONDS)
    while at < seconds:
        (kind,) = choose.choices(list(KINDS), [weight for weight, _, _ in KINDS.values()])
        place, part, failpoint = choose.random(), choose.random(), choose.choice(FAILPOINTS)
        _, least, most = KINDS[kind]
        of_kind = failpoint if kind == "failpoint" else None
        faults.append(Fault(at=at, kind=kind, place=place, lasts=least + part * (most - least), failpoint=of_kind))
        at += choose.uniform(*GAP_SECONDS)
    return faults


@dataclass(kw_only=True, slots=True)
class Window:
    """A period in which the API server or its database was unavailable, in seconds since 1970. until None: it still
    is."""

    what: Away
    since: float
    until: float | None = None

    def overlaps(self, since: float, until: float) -> bool:
        return since < (self.until or float("inf")) and until > self.since


class Nobody(Exception):
    """The fault has no target now."""


@dataclass(kw_only=True, slots=True)
class _Later:
    """An action that is due at a monotonic time. It returns whether it must be repeated."""

    due: float
    act: Callable[[], bool | None]


class Storm:
    """Celery workers, the API server, and their faults. `operator` pauses and resumes jobs and uncordons workers."""

    def __init__(self, site: FaultSite, num_workers: int, operator: Client) -> None:
        self.site = site
        self.operator = operator
        self.workers: list[subprocess.Popen[bytes]] = []
        self.windows: list[Window] = []
        self.restarts: Counter[str] = Counter()
        """By the kind of process and its exit status."""
        self.injected: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.failures: list[str] = []
        """Faults that could not be injected although they had a target."""
        self._later: list[_Later] = []
        self._names = 0
        self._api_lived_at = time.time()
        self._leaving: subprocess.Popen[bytes] | None = None
        self._looked_at = 0.0
        self._armed = ",".join(f"{name}:kill-if={site.gate(name)}" for name in FAILPOINTS)
        self._start_api()
        self.workers = [self._start_worker() for _ in range(num_workers)]

    def inject(self, fault: Fault) -> None:
        act: Callable[[Fault], None] = getattr(self, "_" + fault.kind.replace("-", "_"))
        name = fault.kind if fault.failpoint is None else f"failpoint {fault.failpoint}"
        try:
            act(fault)
        except (Nobody, LorryError, psutil.Error, FileNotFoundError):
            self.left_out[name] += 1
        except Exception as error:  # noqa: BLE001  (the soak of half an hour continues, but fails)
            traceback.print_exc()
            self.failures.append(f"the fault {name} could not be injected: {type(error).__name__}: {error}")
        else:
            self.injected[name] += 1

    def tick(self) -> None:
        """Revert the faults that are due, and restart the processes that have exited."""
        self._revert(time.monotonic())
        for place, worker in enumerate(self.workers):
            if worker.poll() is not None:
                self.restarts[f"worker, status {worker.returncode}"] += 1
                self.workers[place] = self._start_worker()
        self._keep_api()
        if time.monotonic() - self._looked_at > OPERATOR_SECONDS:
            self._looked_at = time.monotonic()
            self._uncordon()

    def end(self) -> list[str]:
        """Revert all faults. Returns the armed failpoints that no process has passed. Repeat until `is_over`."""
        self._revert(float("inf"))
        armed = [name.removeprefix("failpoint ") for name in self.injected if name.startswith("failpoint ")]
        left = [name for name in armed if self.site.gate(name).exists()]
        for name in left:
            self.site.gate(name).unlink(missing_ok=True)
        return left

    @property
    def is_over(self) -> bool:
        return not self._later

    def is_away(self, what: Away) -> bool:
        return any(window.what == what and window.until is None for window in self.windows)

    def _revert(self, now: float) -> None:
        due = [later for later in self._later if later.due <= now]
        self._later = [later for later in self._later if later not in due]
        for later in due:
            if later.act():
                self._then(AGAIN_SECONDS, later.act)

    def _then(self, seconds: float, act: Callable[[], bool | None]) -> None:
        self._later.append(_Later(due=time.monotonic() + seconds, act=act))

    def _opens(self, what: Away, *, since: float | None = None) -> None:
        if not self.is_away(what):
            self.windows.append(Window(what=what, since=time.time() if since is None else since))

    def _closes(self, what: Away) -> None:
        for window in self.windows:
            if window.what == what and window.until is None:
                window.until = time.time()

    # Trainers and workers

    def _trainer_killed(self, fault: Fault) -> None:
        self._some_trainer(fault).kill()

    def _trainer_stopped(self, fault: Fault) -> None:
        self._stop([self._some_trainer(fault)], fault.lasts)

    def _worker_killed(self, fault: Fault) -> None:
        _at(fault.place, self.workers).kill()

    def _worker_stopped(self, fault: Fault) -> None:
        worker = _at(fault.place, self.workers)
        children = [child for child in children_of(worker) if not is_trainer(child)]
        self._stop([psutil.Process(worker.pid), *children], fault.lasts)

    def _worker_drained(self, fault: Fault) -> None:
        _at(fault.place, self.workers).terminate()

    def _failpoint(self, fault: Fault) -> None:
        self.site.gate(str(fault.failpoint)).touch()

    def _some_trainer(self, fault: Fault) -> psutil.Process:
        return _at(fault.place, [each for worker in self.workers for each in self.site.trainers_of(worker)])

    def _stop(self, processes: Sequence[psutil.Process], seconds: float) -> None:
        for process in processes:
            process.suspend()
        self._then(seconds, lambda: _wake(processes))

    def _start_worker(self) -> subprocess.Popen[bytes]:
        self._names += 1
        settings = ["--without-gossip", "--without-mingle", "-c", "1", "-Q", "lorry", "-l", "warning"]
        argv = [*CELERY, "worker", *settings, "-n", f"w{self._names}@%h"]
        return self.site.start(argv, LORRY_DEVICE="cpu", FAILPOINT=self._armed)

    def _uncordon(self) -> None:
        cordoned = select(Worker.id).where(Worker.cordon.is_not(None), Worker.ended_at.is_(None))
        try:
            with self.site.db.read() as session:
                ids = list(session.scalars(cordoned))
        except LorryError:
            return  # the next poll finds them
        for worker_id in ids:
            self.operator.ask("uncordon", "POST", f"/v1/workers/{worker_id}/uncordon")

    # Jobs

    def _job_paused(self, fault: Fault) -> None:
        with self.site.db.read() as session:
            running = list(session.scalars(select(Job.id).where(Job.state == JobState.RUNNING).order_by(Job.id)))
        job_id = _at(fault.place, running)
        self._then(fault.lasts, lambda: self._must_resume_again(job_id))
        if not self.operator.ask("pause", "POST", f"{JOBS}/{job_id}/pause")[0].status:
            raise Nobody

    def _must_resume_again(self, job_id: str) -> bool:
        """Resume a job. Returns whether to retry, because a job that stays paused would never finish."""
        sample, _ = self.operator.ask("resume", "POST", f"{JOBS}/{job_id}/resume")
        return not 0 < sample.status < 500

    # Servers

    def _start_api(self) -> None:
        self._opens("api", since=self._api_lived_at)
        self.site.begin_api(FAILPOINT=self._armed)

    def _keep_api(self) -> None:
        api = self.site.api
        assert api is not None
        if api.poll() is not None:
            self.restarts[f"api, status {api.returncode}"] += 1
            self._start_api()
            return
        self._api_lived_at = time.time()
        if self.is_away("api") and api is not self._leaving and self.site.is_listening(seconds=1.0):
            self._closes("api")

    def _api_killed(self, _fault: Fault) -> None:
        self._leave().kill()

    def _api_restarted(self, _fault: Fault) -> None:
        self._leave().terminate()

    def _leave(self) -> subprocess.Popen[bytes]:
        """Note that the API server is unavailable from now on, although it may still answer for a while."""
        assert self.site.api is not None
        self._opens("api")
        self._leaving = self.site.api
        return self._leaving

    def _redis_flushed(self, _fault: Fault) -> None:
        try:
            with redis.Redis.from_url(self.site.under.redis_url) as client:
                client.flushall()
        except redis.RedisError:
            raise Nobody from None

    def _redis_restarted(self, fault: Fault) -> None:
        server = self.site.under.redis
        if server is None or not server.is_running:
            raise Nobody
        server.kill()
        self._then(fault.lasts, server.start)

    def _postgres_restarted(self, fault: Fault, *, is_killed: bool = False) -> None:
        server = self.site.under.postgres
        if server is None or not server.is_running:
            raise Nobody
        self._opens("database")
        if is_killed:
            server.kill()
        else:
            server.stop()

        def begin() -> None:
            server.start()
            self._closes("database")

        self._then(fault.lasts, begin)

    def _postgres_killed(self, fault: Fault) -> None:
        self._postgres_restarted(fault, is_killed=True)

    def _store_failing(self, fault: Fault) -> None:
        proxy = self.site.under.store
        assert proxy is not None
        proxy.judge = lambda _: BROKEN
        self._then(fault.lasts, proxy.heal)


def _at(place: float, those: Sequence[T]) -> T:
    if not those:
        raise Nobody
    return those[int(place * len(those))]


def _wake(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        try:
            process.resume()
        except psutil.Error:
            continue
