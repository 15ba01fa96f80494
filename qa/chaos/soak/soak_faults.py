"""The faults of a soak: drawn from a seed before the first one, so that a run can be repeated, injected and reverted.

The target of a fault is drawn as a position among the targets that exist at its time. A fault without a target is
counted separately. Nothing here waits: `Acts.tick` reverts lasting faults when they are due.
"""

from __future__ import annotations

import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx
import psutil
import redis
from sqlalchemy import select

from catalog.errors import LorryError
from catalog.states import JobState
from catalog.tables.jobs import Job
from qa.chaos.faults.storage import BROKEN
from qa.chaos.service import FaultSite
from qa.chaos.soak.process_keeper import FAILPOINTS, Kept, timed
from qa.chaos.soak.tenants import Sample

JOBS = "/v1/fine_tuning/jobs"
AGAIN_SECONDS = 1.0
GAP_SECONDS = (2.0, 6.0)
"""Minimum and maximum time between two faults."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of fault. lasts: minimum and maximum seconds until it is reverted; 0: it does not last."""

    says: str
    weight: int
    lasts: tuple[float, float] = (0.0, 0.0)


KINDS = {
    "trainer-killed": Kind(says="SIGKILL of a trainer", weight=7),
    "trainer-stopped": Kind(says="SIGSTOP of a trainer, then SIGCONT", weight=5, lasts=(1.0, 20.0)),
    "worker-killed": Kind(says="SIGKILL of a worker, then a new one", weight=6),
    "worker-stopped": Kind(
        says="SIGSTOP of a worker, then SIGCONT, half of them longer than a lease", weight=5, lasts=(1.0, 30.0)
    ),
    "worker-drained": Kind(says="SIGTERM of a worker, then a new one", weight=5),
    "failpoint": Kind(says="SIGKILL of the next process that passes a failpoint", weight=10),
    "job-paused": Kind(says="a running job paused and resumed over HTTP", weight=10, lasts=(1.0, 12.0)),
    "api-killed": Kind(says="SIGKILL of the API server, then a new one", weight=3),
    "api-restarted": Kind(says="SIGTERM of the API server, then a new one", weight=3),
    "redis-flushed": Kind(says="FLUSHALL", weight=4),
    "redis-restarted": Kind(says="Redis killed, and empty after its restart", weight=3, lasts=(0.5, 8.0)),
    "postgres-restarted": Kind(says="PostgreSQL stopped and restarted", weight=3, lasts=(0.5, 5.0)),
    "postgres-killed": Kind(says="PostgreSQL killed and restarted", weight=2, lasts=(0.0, 2.0)),
    "store-failing": Kind(says="the store responds with 500 to every request", weight=5, lasts=(2.0, 10.0)),
}
"""`Acts` has a method for each."""


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
        faults.append(_one(choose, at))
        at += choose.uniform(*GAP_SECONDS)
    return faults


def _one(choose: random.Random, at: float) -> Fault:
    (kind,) = choose.choices(list(KINDS), [each.weight for each in KINDS.values()])
    place, part, failpoint = choose.random(), choose.random(), choose.choice(FAILPOINTS)
    least, most = KINDS[kind].lasts
    is_failpoint = kind == "failpoint"
    return Fault(
        at=at,
        kind=kind,
        place=place,
        lasts=least + part * (most - least),
        failpoint=failpoint if is_failpoint else None,
    )


class Nobody(Exception):
    """The fault has no target now."""


@dataclass(kw_only=True, slots=True)
class _Later:
    """An action that is due at a monotonic time. It returns whether it must be repeated."""

    due: float
    act: Callable[[], bool]


class Acts:
    def __init__(self, site: FaultSite, kept: Kept) -> None:
        self.site = site
        self.kept = kept
        self.done: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.answers: list[Sample] = []
        """Responses to all pauses and resumes."""
        self.failures: list[str] = []
        """Faults that could not be injected although they had a target."""
        self._later: list[_Later] = []

    def do(self, fault: Fault) -> None:
        act: Callable[[Fault], None] = getattr(self, "_" + fault.kind.replace("-", "_"))
        name = fault.kind if fault.failpoint is None else f"failpoint {fault.failpoint}"
        try:
            act(fault)
        except (Nobody, LorryError, httpx.TransportError, psutil.Error, FileNotFoundError):
            self.left_out[name] += 1
        except Exception as error:  # noqa: BLE001  (the soak of half an hour continues, but fails)
            traceback.print_exc()
            self.failures.append(f"the fault {name} could not be injected: {type(error).__name__}: {error}")
        else:
            self.done[name] += 1

    def tick(self, *, at_once: bool = False) -> None:
        """Revert the faults that are due. at_once: all faults."""
        now = time.monotonic()
        due = [later for later in self._later if at_once or later.due <= now]
        self._later = [later for later in self._later if later not in due]
        for later in due:
            if later.act():
                self._later.append(_Later(due=now + AGAIN_SECONDS, act=later.act))

    @property
    def is_over(self) -> bool:
        return not self._later

    def disarm(self) -> list[str]:
        """Remove and return the armed failpoints that no process has passed."""
        names = [name.removeprefix("failpoint ") for name in self.done if name.startswith("failpoint ")]
        left = [name for name in names if self.site.gate(name).exists()]
        for name in left:
            self.site.gate(name).unlink(missing_ok=True)
        return left

    def _then(self, seconds: float, act: Callable[[], bool | None]) -> None:
        self._later.append(_Later(due=time.monotonic() + seconds, act=lambda: bool(act())))

    # Trainers and workers

    def _trainer_killed(self, fault: Fault) -> None:
        self._some_trainer(fault).kill()

    def _trainer_stopped(self, fault: Fault) -> None:
        self._stop([self._some_trainer(fault)], fault.lasts)

    def _worker_killed(self, fault: Fault) -> None:
        _at(fault.place, self.kept.workers).kill()

    def _worker_stopped(self, fault: Fault) -> None:
        self._stop(self.kept.processes_of(_at(fault.place, self.kept.workers)), fault.lasts)

    def _worker_drained(self, fault: Fault) -> None:
        _at(fault.place, self.kept.workers).send_signal(signal.SIGTERM)

    def _failpoint(self, fault: Fault) -> None:
        assert fault.failpoint is not None
        self.site.gate(fault.failpoint).touch()

    def _some_trainer(self, fault: Fault) -> psutil.Process:
        return _at(fault.place, [each for worker in self.kept.workers for each in self.kept.trainers_of(worker)])

    def _stop(self, processes: Sequence[psutil.Process], seconds: float) -> None:
        for process in processes:
            process.suspend()
        self._then(seconds, lambda: _wake(processes))

    # Jobs

    def _job_paused(self, fault: Fault) -> None:
        with self.site.db.read() as session:
            running = list(session.scalars(select(Job.id).where(Job.state == JobState.RUNNING).order_by(Job.id)))
        job_id = _at(fault.place, running)
        self._then(fault.lasts, lambda: self._resume(job_id))
        self._asked("pause", f"{JOBS}/{job_id}/pause")

    def _resume(self, job_id: str) -> bool:
        """Resume a job. Returns whether to retry, because a job that stays paused would never finish."""
        try:
            answer = self._asked("resume", f"{JOBS}/{job_id}/resume")
        except httpx.TransportError:
            return True
        return answer.status >= 500

    def _asked(self, what: str, path: str) -> Sample:
        answer = timed(what, lambda: self.site.ask("POST", path, timeout=10.0))
        self.answers.append(answer)
        return answer

    # Servers

    def _api_killed(self, _fault: Fault) -> None:
        self.kept.end_api(is_killed=True)

    def _api_restarted(self, _fault: Fault) -> None:
        self.kept.end_api(is_killed=False)

    def _redis_flushed(self, _fault: Fault) -> None:
        try:
            with redis.Redis.from_url(self.site.under.redis_url) as client:
                client.flushall()
        except redis.RedisError:
            raise Nobody from None

    def _redis_restarted(self, fault: Fault) -> None:
        server = self.site.under.redis
        assert server is not None
        if not server.is_running:
            raise Nobody
        server.kill()
        self._then(fault.lasts, server.start)

    def _postgres_restarted(self, fault: Fault) -> None:
        self._postgres_goes(fault, is_killed=False)

    def _postgres_killed(self, fault: Fault) -> None:
        self._postgres_goes(fault, is_killed=True)

    def _postgres_goes(self, fault: Fault, *, is_killed: bool) -> None:
        server = self.site.under.postgres
        assert server is not None
        if not server.is_running:
            raise Nobody
        self.kept.opens("database")
        if is_killed:
            server.kill()
        else:
            server.stop()

        def begin() -> None:
            server.start()
            self.kept.closes("database")

        self._then(fault.lasts, begin)

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
