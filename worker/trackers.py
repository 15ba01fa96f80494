"""Writes the curves of jobs from the database to the runs in their trackers.

One thread claims runs, and one thread for each claimed run writes to it by a child process. A tracker that is slow or
unavailable delays nothing else: its job only gets a line in its events. Credentials come from the worker's environment
by an allow-list. Only this child gets them, and never a trainer.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from importlib.util import find_spec

from catalog.db.database import Database
from catalog.errors import LorryError
from catalog.history import tracker_runs
from catalog.history.tracker_runs import TrackerRunClaim
from catalog.settings import Settings
from catalog.spec.integrations import INTEGRATION_TYPES
from catalog.tables.history import TrackerRunRow
from catalog.tables.table import Json
from worker.process.launcher import CREDENTIAL_NAMES, PROXIES, ROOT, SYSTEM

log = logging.getLogger(__name__)
POLL_SECONDS = 2.0
"""Interval between two polls for due runs, and between two writes to one run."""
MAX_OPEN = 8
LAST_SECONDS = 20.0
"""Time limit for open runs to write their remaining points when the worker exits."""
LIBRARIES = {"wandb": "wandb", "mlflow": "mlflow", "tensorboard": "tensorboardX"}
PASSED_ON = {"wandb": ("WANDB_",), "mlflow": ("MLFLOW_",), "tensorboard": ()}
"""Prefixes of the environment variables that a tracker's child gets in addition to the system's."""
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "DO_NOT_TRACK": "true"}
"""Disables the telemetry of libraries, unless the operator enables it."""
PASSWORD_IN_ADDRESS = re.compile(r"(://)[^\s/@]+(?=@)")
ANSWER_SECONDS = 90.0
CLOSE_SECONDS = 10.0
MAX_PROBLEM = 300


@contextmanager
def writing_runs(db: Database, settings: Settings) -> Generator[None]:
    """Write to the trackers during the block. Does nothing if no tracker is available."""
    types = available(settings)
    if not types:
        yield
        return
    writer = _RunWriter(db, settings, types)
    thread = threading.Thread(target=writer.run, name="trackers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        writer.stopping.set()
        thread.join()


class _RunWriter:
    def __init__(self, db: Database, settings: Settings, types: tuple[str, ...]) -> None:
        self._db, self._settings, self._types = db, settings, types
        self.stopping = threading.Event()
        self._sessions: set[TrackerRunSession] = set()

    def run(self) -> None:
        """Claim runs until the worker exits. Then give the threads time to write the remaining points."""
        written: set[Future[None]] = set()
        with ThreadPoolExecutor(max_workers=MAX_OPEN, thread_name_prefix="trackers") as pool:
            while not self.stopping.wait(POLL_SECONDS):
                written = {each for each in written if not each.done()}
                try:
                    claimed = tracker_runs.claim(self._db, types=self._types, limit=MAX_OPEN - len(written))
                    written |= {pool.submit(self._write_run, each) for each in claimed}
                except LorryError as error:
                    log.warning("%s Writing to trackers is delayed.", error)
                except Exception:
                    log.exception("Writing to trackers failed, and is retried.")
            wait(written, timeout=LAST_SECONDS)
            for session in list(self._sessions):
                session.kill()

    def _write_run(self, claim: TrackerRunClaim) -> None:
        """Write the points of one job, until it is no longer training or the worker exits."""
        session: TrackerRunSession | None = None
        current: TrackerRunClaim | None = claim
        try:
            while current is not None:
                is_last = self.stopping.is_set()
                news = tracker_runs.poll(self._db, current)
                if session is None:
                    session = self._begin(current.row, news.run)
                session.write(news.points, news.end)
                current = tracker_runs.record(self._db, current, news, run_id=session.run_id)
                if is_last:
                    break
                if current is not None and not news.has_more:
                    self.stopping.wait(POLL_SECONDS)
        except TrackerRunFailed as failure:
            if not self.stopping.is_set():  # otherwise its process may have been killed, and the next worker tries
                tracker_runs.fail(self._db, claim, str(failure))
        except LorryError as error:  # the claim expires, and then a worker opens the run again
            log.warning("%s Writing the curves of job %s to %s is retried.", error, claim.row.job_id, claim.row.type)
        except Exception:
            log.exception("Writing the curves of job %s to %s failed.", claim.row.job_id, claim.row.type)
        finally:
            if session is not None:
                session.close()
                self._sessions.discard(session)
            if self.stopping.is_set():
                with suppress(LorryError):
                    tracker_runs.release(self._db, claim)

    def _begin(self, row: TrackerRunRow, run: Json) -> TrackerRunSession:
        opening = {
            "type": row.type,
            "run": run,
            "run_id": row.run_id,
            "next_step": max(row.train_step, row.valid_step) + 1,
            "places": {row.type: places(self._settings)[row.type]},
        }
        session = TrackerRunSession(opening)
        self._sessions.add(session)
        return session


class TrackerRunFailed(Exception):
    """The tracker, or its library, reported an error, which is the text."""


def available(settings: Settings) -> tuple[str, ...]:
    """Return the tracker types that this worker can write: their libraries are installed. Imports none of them. W&B
    also needs a key or its offline mode."""
    wanted = settings.named_integrations()
    found = [name for name in INTEGRATION_TYPES if name in wanted and find_spec(LIBRARIES[name]) is not None]
    has_account = "WANDB_API_KEY" in os.environ or os.environ.get("WANDB_MODE") == "offline"
    return tuple(name for name in found if name != "wandb" or has_account)


def places(settings: Settings) -> dict[str, str]:
    """Return where each tracker writes to, as the operator has configured it."""
    return {
        "mlflow": settings.resolved_mlflow_tracking_uri(),
        "tensorboard": str(settings.tensorboard_dir or settings.data_dir / "tensorboard"),
        "wandb": str(settings.data_dir / "wandb"),
    }


class TrackerRunSession:
    """An open run. Only `kill` may be called by other threads."""

    def __init__(self, opening: Json, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        """Open the run. Raises TrackerRunFailed."""
        self._answer_seconds = answer_seconds
        self._environment = _environment(opening["type"])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "worker.children.tracker"],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            self.run_id = str(self._ask(opening)["run_id"])
        except TrackerRunFailed:
            self.close()
            raise

    def write(self, points: list[Json], end: Json | None) -> None:
        """Write points. end: of the job, if it has ended. Raises TrackerRunFailed."""
        self._ask({"points": points, "end": end})

    def close(self) -> None:
        """Close the run so that it keeps its points, within a time limit."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(CLOSE_SECONDS)
        self.kill()
        self._process.wait()
        self._process.stdout.close()

    def kill(self) -> None:
        """Kill the child and all processes that its library has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _ask(self, message: Json) -> Json:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watch = threading.Timer(self._answer_seconds, self.kill)
        watch.start()
        try:
            with suppress(OSError):  # the child has exited: its last line may contain the reason
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            raise TrackerRunFailed("its process exited, or did not answer in time.")
        answer: Json = json.loads(line)
        if "error" in answer:
            raise TrackerRunFailed(self._without_secrets(str(answer["error"])))
        return answer

    def _without_secrets(self, text: str) -> str:
        for name, value in self._environment.items():
            if CREDENTIAL_NAMES.search(name) and value:
                text = text.replace(value, "…")
        return " ".join(PASSWORD_IN_ADDRESS.sub(r"\1…", text).split())[:MAX_PROBLEM]


def _environment(type_: str) -> dict[str, str]:
    names = {*SYSTEM, *PROXIES, "SSL_CERT_FILE", "SSL_CERT_DIR"}
    prefixes = ("LC_", *PASSED_ON[type_])
    return QUIET | {name: value for name, value in os.environ.items() if name in names or name.startswith(prefixes)}
