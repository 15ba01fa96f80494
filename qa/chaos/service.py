"""A whole service for fault injection: API server and workers as processes, on either database, and the observations
that the auditor needs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import text

from catalog.audit import chain
from catalog.errors import OutOfSpace, Unavailable
from catalog.jobs import commands
from catalog.states import EndReason, JobState
from catalog.tables.jobs import Job
from qa.chaos.audit.auditor import audit
from qa.chaos.audit.findings import Finding, Hook, Seen
from qa.chaos.audit.leftovers import processes
from qa.chaos.audit.trainer_watch import Watch
from tests.api.hook_receiver import Answer, Received
from tests.services.fault_proxy import FaultProxy
from tests.services.running import Restartable, free_port
from tests.worker_site import BASE, PEPPER, SHORT_LEASE, WorkerSite, is_gone

SMALL: dict[str, Any] = {"hyperparameters": {"batch_size": 4}, "max_steps": 30, "checkpoint_every_steps": 10}
"""The job of most faults. Its adapter has a known digest."""
NUM_ROWS = 40
PATIENCE_SECONDS = 300.0
"""Time limit that is sufficient on a busy machine."""
ALONE_SECONDS = 10.0
"""How long child processes may outlive their worker. The guarantee is one second, but a busy machine takes longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Under:
    """The servers of a site, if it has them. Faults can be injected into each of them."""

    postgres: Restartable | None = None
    redis: Restartable | None = None
    redis_url: str = ""
    store: FaultProxy | None = None
    """The proxy in front of the bucket."""


class FaultSite(WorkerSite):
    """A service for fault injection. `url` is the address of the API server, and stays the same after restarts."""

    patience_seconds = PATIENCE_SECONDS

    def __init__(self, folder: Path, *, under: Under, weights: str | None, **environment: str) -> None:
        """weights: digest of the small job's adapter without any fault."""
        super().__init__(folder, **{**SHORT_LEASE, **environment})
        self.under = under
        self.weights = weights
        self.submissions: dict[str, list[str]] = defaultdict(list)
        self.hooks: list[Hook] = []
        self.api: subprocess.Popen[bytes] | None = None
        self._port = free_port()
        self._watch = Watch(self.settings.work_dir())
        self._watch.__enter__()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    # Observing

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition. It counts as not fulfilled while the database does not answer."""

        def is_fulfilled() -> object:
            try:
                return condition()
            except (Unavailable, OutOfSpace):
                return None

        super().wait_until(is_fulfilled)

    def wait_seconds(self, seconds: float) -> None:
        """Wait in real time, for a lease or an outage."""
        time.sleep(seconds)

    def trainer_of(self, worker: subprocess.Popen[bytes]) -> psutil.Process:
        """Wait for the worker's trainer and return it, even if it has only just started."""
        self.wait_until(lambda: self.trainers_of(worker))
        return self.trainers_of(worker)[0]

    def trainers_of(self, worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Return the running trainers of a worker."""
        return [child for child in children_of(worker) if is_trainer(child)]

    def has_seen_trainer(self) -> bool:
        """Return whether any trainer has held a job, even if it no longer runs."""
        return bool(self._watch.sightings())

    def seconds_until_alone(self) -> float:
        """Wait until no trainer or other child of a worker that has just exited is left. Returns the seconds."""
        seconds = self.seconds_until(lambda: not processes(self.settings.work_dir()))
        assert seconds < ALONE_SECONDS, f"processes outlived their worker by {seconds:.1f} s"
        return seconds

    def num_jobs(self) -> int:
        with self.db.read() as session:
            return session.query(Job).count()

    def seconds_until(self, condition: Callable[[], object]) -> float:
        began = time.monotonic()
        self.wait_until(condition)
        return time.monotonic() - began

    def is_anybody_writing(self) -> bool:
        """Return whether SQLite's lock is held, or a transaction of PostgreSQL waits for its client for unusually
        long."""
        if self.db.is_sqlite:
            try:
                with self.db.write_briefly():
                    return False
            except Unavailable:
                return True
        waits = "datname = current_database() and state = 'idle in transaction' and now() - state_change > '0.5 s'"
        with self.db.read() as session:
            return bool(session.scalar(text(f"select count(*) from pg_stat_activity where {waits}")))

    def wait_for_file(self, pattern: str) -> None:
        """Wait until a trainer has written a file. pattern: relative to the trainer's directory."""
        self.wait_until(lambda: list(self.settings.work_dir().glob(f"trainers/*/{pattern}")))

    # Requests to the API server

    def start_api(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start the API server, and wait until it answers."""
        api = self.begin_api(**environment)
        self.wait_until(self._answers)
        return api

    def begin_api(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start the API server without waiting until it answers."""
        argv = [sys.executable, "-m", "api", "--log-level", "warning", "serve", "--port", str(self._port)]
        hooks = {"LORRY_WEBHOOK_ALLOWED_NETWORKS": "127.0.0.1/32", "LORRY_WEBHOOK_ALLOW_HTTP": "true"}
        self.api = self.start(argv, LORRY_PEPPER=PEPPER, LORRY_REQUESTS_PER_MINUTE="0", **hooks, **environment)
        return self.api

    def ask(self, method: str, path: str, *, timeout: float = 60.0, **given: Any) -> httpx.Response:
        """Send a request. Raises httpx.TransportError if there is no response."""
        with httpx.Client(base_url=self.url, trust_env=False, timeout=timeout) as client:
            headers = {"authorization": f"Bearer {self.key}", **given.pop("headers", {})}
            return client.request(method, path, headers=headers, **given)

    def post_job(self, training_file: str, *, idempotency_key: str, **fields: Any) -> httpx.Response:
        """Submit a job over HTTP. The id in the response is kept for the auditor."""
        body = {"model": BASE, "training_file": training_file, "seed": 1, "precision": "float32", **fields}
        headers = {"idempotency-key": idempotency_key}
        response = self.ask("POST", "/v1/fine_tuning/jobs", json=body, headers=headers)
        if response.status_code == 200:
            self.submissions[idempotency_key].append(response.json()["id"])
        return response

    def _answers(self) -> bool:
        assert self.api is not None
        assert self.api.poll() is None, self.log()
        return self.is_listening()

    def is_listening(self, *, seconds: float = 5.0) -> bool:
        """Return whether the API server answers within this time."""
        try:
            return self.ask("GET", "/healthz", timeout=seconds).status_code == 200
        except httpx.TransportError:
            return False

    # Common actions of faults

    def submit_small(self, **fields: Any) -> str:
        return self.submit(self.upload(NUM_ROWS), **{**SMALL, **fields})

    def train_to_step_15(self, **environment: str) -> tuple[str, subprocess.Popen[bytes]]:
        """Train the small job up to step 15, where its trainer waits for the gate `go`. Returns its id and worker."""
        job_id = self.submit_small()
        worker = self.start_worker(FAILPOINT=f"step_15:wait={self.gate('go')}", **environment)
        self.wait_until(lambda: self.checkpoint_steps(job_id) == [10])
        self.wait_for_step(15, job_id)
        return job_id, worker

    def finish(self, *job_ids: str, is_small: bool = True, **environment: str) -> None:
        """Finish jobs with one more worker. is_small: their adapters must have the bytes of an undisturbed job."""
        worker = self.start_worker(**environment)
        self.wait_for_success(*job_ids, is_small=is_small)
        self.wait_until(lambda: f"-{worker.pid}-" in self.log())  # it has logged its id and handles signals from now on

    def wait_for_success(self, *job_ids: str, is_small: bool = True) -> None:
        self.wait_for_end(*job_ids)
        for job_id in job_ids:
            assert self.job(job_id).state == JobState.SUCCEEDED, f"{self.job(job_id).error}\n{self.log()}"
            if is_small and self.weights is not None:
                digest = self.weights_digest(job_id)
                assert digest == self.weights, f"its digest {digest} differs from {self.weights} of an undisturbed job"

    def cancel(self, *job_ids: str) -> None:
        """Cancel jobs, which is the fastest way to finish them."""
        for job_id in job_ids:
            commands.cancel(self.db, project_id=self.caller.project_id, job_id=job_id)

    def assert_attempts(self, job_id: str, *reasons: EndReason, resumed_from: int | None = None) -> None:
        """Check the reasons for which the job's attempts ended, and the step from which the last one resumed."""
        assert self.reasons(job_id) == list(reasons), self.attempts_text(job_id)
        if resumed_from is not None:
            assert self.attempts(job_id)[-1].resumed_from_step == resumed_from, self.attempts_text(job_id)

    def assert_exits(self, process: subprocess.Popen[bytes], *, status: int = 0) -> None:
        assert process.wait(PATIENCE_SECONDS) == status, self.log()

    def attempts_text(self, job_id: str) -> str:
        """Return a short text about the ends of a job's attempts."""
        told = ((each.reason, each.resumed_from_step) for each in self.attempts(job_id))
        return ", then ".join(f"{reason} from step {step}" if step else str(reason) for reason, step in told)

    # The end of a fault

    def stop(self) -> None:
        """Send SIGTERM to all running processes, and check that they exit with status 0."""
        live = [process for process in self._processes if process.poll() is None]
        for process in live:
            process.send_signal(signal.SIGTERM)
        for process in live:
            self.assert_exits(process)

    def audit(self) -> list[Finding]:
        """Audit the service after `stop`. Seals the remaining audit events first, as an API server would."""
        self._watch.__exit__()
        chain.seal(self.db, pepper=PEPPER.encode())
        return audit(
            self.settings.resolved_database_url(),
            store_url=self.settings.resolved_store_url(),
            lease_seconds=self.settings.lease_seconds,
            seen=Seen(submissions=self.submissions, hooks=self.hooks, trainers=self._watch.sightings()),
            work_dir=self.settings.work_dir(),
            pepper=PEPPER.encode(),
        )

    def heard(self, request: Received) -> Answer:
        """Note a received webhook, and accept it."""
        told, event_id = json.loads(request.body), request.headers["webhook-id"]
        self.hooks.append(Hook(event_id=event_id, event_type=told["type"], job_id=told["data"]["id"]))
        return Answer()


def children_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the running processes below a worker, which may have exited."""
    try:
        found = psutil.Process(process.pid).children(recursive=True)
        return [child for child in found if not is_gone(child)]
    except psutil.NoSuchProcess:
        return []


def is_trainer(process: psutil.Process) -> bool:
    try:
        return "worker.children.trainer.main" in process.cmdline()
    except psutil.Error:
        return False
