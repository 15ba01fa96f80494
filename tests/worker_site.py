"""A service without its API server, for tests: a data folder, the catalog's functions and real worker processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from catalog.db.database import Database
from catalog.errors import Unavailable
from catalog.history import queries
from catalog.jobs import commands, submission
from catalog.pepper import Pepper
from catalog.registry import base_models
from catalog.settings import Settings
from catalog.spec.job import JobRequest
from catalog.states import FINAL_STATES
from catalog.storage import files
from catalog.storage.store import open_store
from catalog.tables.fleet import Trainer, Worker
from catalog.tables.history import Checkpoint, JobEvent
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, Artifact
from catalog.tenancy import authentication, projects
from catalog.tenancy.authentication import Caller
from tests import tiny_base
from tests.catalog.world import allow_urgent
from tests.services.postgres import as_role, role_of
from worker.protocol.mailbox import EventReader, TrainerDirectory

ROOT = Path(__file__).parents[1]
BASE = "tiny"
WAIT_SECONDS = 500.0
LIVE_SECONDS = 60.0
"""A worker with a heartbeat in this time is live for requests."""
GONE_SECONDS = 10.0
"""Maximum time that a trainer may outlive its worker, below the lease. A trainer exits when the lease ends."""
SHORT_LEASE = {"LORRY_LEASE_SECONDS": "15"}
"""For tests that wait until the lease of a killed worker expires."""
PEPPER = "pepper of a test site, long enough"
"""The pepper that an API server over a site needs to accept the site's key."""


class WorkerSite:
    """All requirements of a worker, in one folder."""

    patience_seconds = WAIT_SECONDS

    def __init__(self, folder: Path, **environment: str) -> None:
        self.environment = {
            "LORRY_DATA_DIR": str(folder / "data"),
            "LORRY_LEASE_SECONDS": "60",
            "LORRY_HEARTBEAT_SECONDS": "0.5",
            "LORRY_POLL_SECONDS": "0.1",
            "LORRY_IDLE_SECONDS": "0",
            "LORRY_STANDBY_TRAINER": "false",
            "LORRY_MAX_SLOWDOWN": "1000",  # otherwise measured speeds decide which jobs train together
            **environment,
        }
        values = {name.removeprefix("LORRY_").lower(): value for name, value in self.environment.items()}
        self.settings = Settings(**values)  # pyright: ignore[reportArgumentType]
        self.folder = folder
        self.db = Database(self.settings.resolved_database_url())
        self.db.migrate()
        self.store = open_store(self.settings)
        project = projects.ensure(self.db)
        pepper = Pepper(current=PEPPER.encode())
        key, self.key = authentication.create(
            self.db, project_id=project.id, name="test", pepper=pepper, is_operator=True
        )
        allow_urgent(self.db, key)
        self.caller = Caller(
            api_key_id=key.id,
            project_id=project.id,
            project_name=project.name,
            organization_id=project.organization_id,
            organization_name="default",
            is_operator=True,
            name="test",
        )
        self._processes: list[subprocess.Popen[bytes]] = []

    # Actions of a user

    def upload(self, rows: int, *, seed: int = 0) -> str:
        return self.upload_file(tiny_base.write_chat(self.folder / f"rows-{rows}-{seed}.jsonl", rows, seed=seed))

    def upload_file(self, path: Path) -> str:
        """Upload a file of rows. `path` itself stays."""
        spooled = self.folder / f"spooled-{path.name}"
        shutil.copy(path, spooled)
        content = path.read_bytes()
        file = files.create(
            self.db,
            self.store,
            project_id=self.caller.project_id,
            purpose="fine-tune",
            filename=path.name,
            spooled=spooled,
            num_bytes=len(content),
            digest=hashlib.sha256(content).hexdigest(),
            settings=self.settings,
        )
        return file.id

    def submit(self, training_file: str, *, validation_file: str | None = None, **fields: Any) -> str:
        body = {"model": BASE, "training_file": training_file, "validation_file": validation_file}
        body |= {"seed": 1, "precision": "float32", **fields}
        request = JobRequest.model_validate(body)
        return submission.create(self.db, caller=self.caller, request=request, body_digest=os.urandom(8).hex()).id

    def job(self, job_id: str) -> Job:
        return commands.get(self.db, project_id=self.caller.project_id, job_id=job_id)

    def events(self, job_id: str) -> list[JobEvent]:
        return queries.events_page(self.db, project_id=self.caller.project_id, job_id=job_id, limit=10_000).items[::-1]

    def attempts(self, job_id: str) -> list[Any]:
        return queries.attempts(self.db, project_id=self.caller.project_id, job_id=job_id)

    def reasons(self, job_id: str) -> list[str]:
        """The end reasons of the attempts."""
        return [attempt.reason for attempt in self.attempts(job_id)]

    def checkpoint_steps(self, job_id: str) -> list[int]:
        with self.db.read() as session:
            return sorted(row.step for row in session.query(Checkpoint).where(Checkpoint.job_id == job_id))

    def trainer_pid(self, job_id: str) -> int:
        """The report of its trainer when it was ready."""
        with self.db.read() as session:
            trainer = session.get(Trainer, self.job(job_id).trainer_id)
        assert trainer is not None
        assert trainer.report is not None
        return int(trainer.report["pid"])

    def adapters(self) -> list[Adapter]:
        with self.db.read() as session:
            return list(session.query(Adapter))

    def adapter(self, job_id: str) -> Adapter:
        return next(adapter for adapter in self.adapters() if adapter.job_id == job_id)

    def weights_digest(self, job_id: str) -> str:
        """The sha256 of the job's adapter_model.safetensors."""
        with self.db.read() as session:
            artifact = session.get_one(Artifact, self.adapter(job_id).artifact)
        return next(file["digest"] for file in artifact.files if file["path"] == "adapter_model.safetensors")

    # Processes

    def start_worker(self, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        return self.start(
            [sys.executable, "-m", "worker.entrypoints.loop", "--device", "cpu", *arguments], **environment
        )

    def wait_for_worker(self) -> None:
        """Wait until a live worker is registered. Until then, requests are rejected.

        The site may be a copy with the record of the worker that imported its base model.
        """

        def is_registered() -> bool:
            with self.db.read() as session:
                return (
                    session.query(Worker).filter(Worker.heartbeat_at > time.time() - LIVE_SECONDS).first() is not None
                )

        self.wait_until(is_registered)

    def start(self, argv: list[str], **environment: str) -> subprocess.Popen[bytes]:
        """On PostgreSQL, the process has the database role of a worker."""
        url = as_role(self.settings.resolved_database_url(), role_of(argv))
        given = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "LORRY_DATABASE_URL": url}
        with (self.folder / f"process-{len(self._processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                argv,
                env=os.environ | self.environment | given | environment,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._processes.append(process)
        return process

    def stop_between_writes(self, worker: subprocess.Popen[bytes]) -> None:
        """SQLite has one writer: a process that is suspended during its own write would block the whole service."""

        def others_may_write() -> bool:
            worker.send_signal(signal.SIGSTOP)
            try:
                with self.db.write_briefly():
                    return True
            except Unavailable:
                worker.send_signal(signal.SIGCONT)
                return False

        self.wait_until(others_may_write)

    def import_base(self, source: Path, *, name: str = BASE) -> None:
        """Run a worker until it has imported the base model."""
        base_models.add(self.db, name=name, kind="folder", source=str(source))
        self.work_until_done()
        assert base_models.get(self.db, name).state == "ready", self.log()

    def work_until_done(self, **environment: str) -> None:
        """Run one worker that exits when no work is left."""
        worker = self.start_worker("--once", **environment)
        assert worker.wait(self.patience_seconds) == 0, self.log()

    def log(self) -> str:
        """The output of all processes."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("process-*.log")))

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Poll the condition. Fails with the processes' output after a timeout."""
        wait_until(condition, message=self.log, seconds=self.patience_seconds)

    def wait_for_end(self, *job_ids: str) -> None:
        self.wait_until(lambda: all(self.job(job_id).state in FINAL_STATES for job_id in job_ids))

    def wait_for_step(self, step: int, *job_ids: str) -> None:
        """Wait until any of the jobs is at the step: a trainer that waits at a failpoint delays the others."""
        self.wait_until(lambda: any((self.job(job_id).progress or {}).get("step", 0) >= step for job_id in job_ids))

    def gate(self, name: str) -> Path:
        """A file that a failpoint waits for; `touch` it to let the trainer continue."""
        return self.folder / f"gate-{name}"

    def wait_for_message(self, verb: str) -> None:
        """Wait until a worker has written this message for a trainer that has not read it yet."""
        self.wait_until(lambda: self.has_unread_message(verb))

    def has_unread_message(self, verb: str) -> bool:
        return bool(list(self.settings.work_dir().glob(f"trainers/*/inbox/*-{verb}.json")))

    def standing_by(self) -> list[Path]:
        """Directories of trainers that wait for a base model."""
        found = self.settings.work_dir().glob("trainers/standby-*/events.jsonl")
        directories = [TrainerDirectory(path.parent) for path in found]
        return [each.path for each in directories if [e["type"] for e in EventReader(each).read()] == ["standing_by"]]

    def close(self) -> None:
        self.kill_all()
        self.db.close()

    def kill_all(self) -> None:
        """All processes that the site started."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


def wait_until(
    condition: Callable[[], object],
    *,
    message: Callable[[], str] = str,
    seconds: float = WAIT_SECONDS,
    every_seconds: float = 0.05,
) -> None:
    """Poll the condition. Fails with the message after a timeout."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message()
        time.sleep(every_seconds)


def is_gone_in_time(process: psutil.Process) -> bool:
    """Wait at most GONE_SECONDS."""
    deadline = time.monotonic() + GONE_SECONDS
    while True:
        is_last = time.monotonic() >= deadline  # before the check: this process may have been paused
        gone = is_gone(process)
        if gone or is_last:
            return gone
        time.sleep(0.01)


def is_gone(process: psutil.Process) -> bool:
    """Return whether a process has exited. A zombie has."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def worker_site(folder: Path, **environment: str) -> Iterator[WorkerSite]:
    """A site that has imported the tiny base model; its data folder is `folder`/data."""
    shutil.copytree(_imported() / "data", folder / "data")
    site = WorkerSite(folder, **environment)
    try:
        yield site
    finally:
        site.close()


@contextlib.contextmanager
def bare_site(folder: Path, **environment: str) -> Iterator[WorkerSite]:
    """A site without a base model, for tests of workers that train nothing."""
    site = WorkerSite(folder, **environment)
    try:
        yield site
    finally:
        site.close()


@functools.cache
def _imported() -> Path:
    """A folder whose data folder has the base model. A real worker imports it, once for all tests."""
    folder = Path(tempfile.mkdtemp(prefix="lorry-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    site = WorkerSite(folder)
    try:
        site.import_base(tiny_base.make(folder / "base"))
    finally:
        site.close()
    return folder
