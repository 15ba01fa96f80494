"""Injects the faults of a soak, and reverts those that last. A fault without a target is counted separately.

Nothing here waits: `tick` reverts lasting faults when they are due, while other faults continue.
"""

from __future__ import annotations

import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx
import obstore
import psutil
import redis
from obstore.store import from_url
from sqlalchemy import func, select

from catalog.errors import LorryError
from catalog.states import JobState
from catalog.tables.fleet import Trainer
from catalog.tables.history import Checkpoint
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, Artifact
from qa.chaos.faults.store import BROKEN
from qa.chaos.service import FaultSite
from qa.chaos.soak.fault_schedule import Fault
from qa.chaos.soak.load_client import Sample
from qa.chaos.soak.process_keeper import Kept, timed

JOBS = "/v1/fine_tuning/jobs"
AGAIN_SECONDS = 1.0
T = TypeVar("T")


class Nobody(Exception):
    """The fault has no target now."""


@dataclass(kw_only=True, slots=True)
class _Later:
    """An action that is due at a monotonic time. It returns whether it must be repeated."""

    due: float
    act: Callable[[], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class CutShort:
    """A file without its last byte. content: of the whole file. at: in seconds since 1970."""

    content: bytes
    at: float


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
        self.truncated: dict[str, CutShort] = {}
        """Truncated files, by their digest."""
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

    def put_back(self) -> int:
        """Restore the files that are still truncated, so that the auditor finds only faults of Lorry.

        Files that were stored again in the meantime must be intact, so they are not restored. Files that are missing in
        the store were deleted by Lorry. Returns the number of restored files.
        """
        store = from_url(self.site.settings.resolved_store_url(), client_options={"allow_http": True})
        stored_at = self._stored_at()
        number = 0
        for digest, cut in self.truncated.items():
            try:
                is_whole = obstore.head(store, _key(digest))["size"] == len(cut.content)
            except FileNotFoundError:
                continue
            if not is_whole and stored_at.get(digest, 0.0) < cut.at:
                obstore.put(store, _key(digest), cut.content)
                number += 1
        return number

    def _stored_at(self) -> dict[str, float]:
        """Return, by file, when the latest checkpoint or adapter with it was created."""
        latest: dict[str, float] = {}
        with self.site.db.read() as session:
            for owner in (Checkpoint, Adapter):
                named = select(owner.created_at, Artifact.files).join(Artifact, Artifact.digest == owner.artifact)
                for at, files in session.execute(named):
                    latest |= {file["digest"]: max(at, latest.get(file["digest"], 0.0)) for file in files}
        return latest

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

    def _checkpoint_truncated(self, fault: Fault) -> None:
        pid, digest = _at(fault.place, self._with_two_checkpoints())
        store = from_url(self.site.settings.resolved_store_url(), client_options={"allow_http": True})
        content = bytes(obstore.get(store, _key(digest)).bytes())
        if digest not in self.truncated:
            self.truncated[digest] = CutShort(content=content, at=time.time())
        obstore.put(store, _key(digest), self.truncated[digest].content[:-1])
        psutil.Process(pid).kill()

    def _with_two_checkpoints(self) -> list[tuple[int, str]]:
        """Return, for running jobs with at least two checkpoints, the trainer's process id and the largest file of the
        newest checkpoint."""
        newest = select(Checkpoint.job_id, func.max(Checkpoint.step).label("step"))
        newest = newest.group_by(Checkpoint.job_id).having(func.count() > 1).subquery()
        found = select(Trainer.report, Artifact.files).join(Job, Job.trainer_id == Trainer.id)
        found = found.join(newest, newest.c.job_id == Job.id)
        found = found.join(Checkpoint, (Checkpoint.job_id == Job.id) & (Checkpoint.step == newest.c.step))
        found = found.join(Artifact, Artifact.digest == Checkpoint.artifact).where(Job.state == JobState.RUNNING)
        with self.site.db.read() as session:
            rows = session.execute(found.order_by(Job.id)).all()
        ready = [row for row in rows if "pid" in (row.report or {})]
        return [(row.report["pid"], max(row.files, key=lambda file: file["num_bytes"])["digest"]) for row in ready]

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


def _key(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"
