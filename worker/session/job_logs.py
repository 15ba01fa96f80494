"""Stores the output of a trainer as the log of each of its jobs, from the admission of the job until its end.

A trainer's processes write to files in its directory, which are truncated when they grow long. A stored log is bounded.
It contains no secret of the worker and no name of another job, because a trainer may hold jobs of several projects. The
recorded end of an attempt is cleaned in the same way.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from catalog import logs
from catalog.errors import LorryError, StaleClaim
from catalog.history import job_logs
from catalog.queue.claiming import Claim
from catalog.spec.job import JobSpec
from catalog.storage.store import Blob
from catalog.tables.table import ANY_ID
from worker.context.context import WorkerContext
from worker.process.launcher import CREDENTIAL_NAMES
from worker.protocol.mailbox import TrainerDirectory, cut_from
from worker.protocol.trainer_paths import open_file
from worker.session.session_job import End

log = logging.getLogger(__name__)
LONGEST_FILE_BYTES = 4 * 2**20
"""A longer file is truncated. Up to the same number of bytes before it is kept."""
HEAD_BYTES = job_logs.MAX_BYTES // 4
LONGEST_LINE = 4000
"""In characters."""
PUSH_SECONDS = 60.0
"""Interval at which the new output of running jobs is stored."""
SECRET_NAMES = re.compile(rf"{CREDENTIAL_NAMES.pattern}|_URL$|_URI$")
SHORTEST_SECRET = 8
NAMES = re.compile(r"\bft:[^\s'\"]+")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|\x1b\[[0-9;]*[A-Za-z]")


class LogFile:
    """The log file of one process. Offsets count from the first byte ever written, even after it was removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before = cut_from(path)
        self._num_cut = 0
        self._is_reported = False

    def end(self) -> int:
        return self._num_cut + _size(self.path)

    def keep_short(self) -> None:
        """Truncate the file if it is long. Its process appends, so it continues at the new end. Output that is written
        in this very moment may be lost. If the disk is full, the file stays, and the part before it is deleted."""
        if _size(self.path) <= LONGEST_FILE_BYTES:
            return
        try:
            with (
                os.fdopen(open_file(self.path, os.O_RDWR), "r+b") as printed,
                os.fdopen(open_file(self._before, os.O_WRONLY | os.O_CREAT), "wb") as before,
            ):
                before.truncate()
                shutil.copyfileobj(printed, before)
                printed.truncate(0)
        except OSError as error:
            self._warn_once(error)
            with suppress(OSError):
                self._before.unlink(missing_ok=True)
        else:
            self._num_cut += _size(self._before)

    def _warn_once(self, error: OSError) -> None:
        if not self._is_reported:
            log.warning("The log of a trainer is long and can't be truncated: %s", error)
        self._is_reported = True

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes of this range that still exist."""
        first = self._num_cut - _size(self._before)
        before = _part(self._before, start - first, min(end, self._num_cut) - first)
        return before + _part(self.path, start - self._num_cut, end - self._num_cut)


class LogFiles:
    """The log files of all processes of a trainer, by rank. Further processes may appear later."""

    def __init__(self, directory: TrainerDirectory) -> None:
        self._directory = directory
        self._files: dict[int, LogFile] = {}

    def found(self) -> dict[int, LogFile]:
        """Return all files. If the folder can't be read now, return those that were found earlier."""
        with suppress(OSError):
            for rank, path in self._directory.logs().items():
                self._files.setdefault(rank, LogFile(path))
        return self._files

    def keep_short(self) -> None:
        for file in self.found().values():
            file.keep_short()


@dataclass(frozen=True, kw_only=True, slots=True)
class _OpenLog:
    claim: Claim
    worker_id: str
    """The worker that holds the claim."""
    begins_at: Mapping[int, int]
    """Offset of the job's first byte, by rank. For a rank that appears later, it is 0."""
    pushed: dict[int, str] = field(default_factory=dict[int, str])
    """Digest of the content that was stored last, by rank."""


class Output:
    """The output of one trainer, for the duration of its session."""

    def __init__(self, context: WorkerContext, directory: TrainerDirectory, *, first_rank: int = 0) -> None:
        """first_rank: the first rank on this node, if other ranks run on other nodes."""
        self._context = context
        self._first_rank = first_rank
        self._directory = directory
        self._files = LogFiles(directory)
        self._open: dict[str, _OpenLog] = {}
        self._due_at = time.monotonic() + PUSH_SECONDS

    def begin(self, claim: Claim, *, is_loading: bool) -> None:
        """Start the log of a job. is_loading: the trainer loads its base model for this job, so its earlier output
        belongs to the job too."""
        begins_at = self._directory.log_starts if is_loading else self.ends()
        self.begin_at(claim, begins_at, worker_id=self._context.worker_id)

    def begin_at(self, claim: Claim, begins_at: Mapping[int, int], *, worker_id: str) -> None:
        """Start the log of a job at given offsets. begins_at: the job's first byte in each process's file. worker_id:
        the worker that holds the claim."""
        self._open[claim.claim_id] = _OpenLog(claim=claim, worker_id=worker_id, begins_at=begins_at)

    def ends(self) -> dict[int, int]:
        """Return the current end of each process's file."""
        return {rank: file.end() for rank, file in self._files.found().items()}

    def push_due(self) -> None:
        """Every PUSH_SECONDS, store the new output of each job and truncate long files."""
        if time.monotonic() < self._due_at:
            return
        self._due_at = time.monotonic() + PUSH_SECONDS
        for entry in self._open.values():
            self._push(entry)
        self._files.keep_short()

    def end(self, claim_id: str) -> None:
        """Store the job's last output: the job leaves the trainer."""
        if (entry := self._open.pop(claim_id, None)) is not None:
            self._push(entry)

    def drop(self, claim_id: str) -> None:
        """Store nothing more for the job: another worker has it now."""
        self._open.pop(claim_id, None)

    def _push(self, entry: _OpenLog) -> None:
        """Store a job's output if possible: no training, and no end of an attempt, waits for it."""
        try:
            for rank, file in self._files.found().items():
                content = publishable(file, entry.begins_at.get(rank, 0), entry.claim, self._context.settings.data_dir)
                if content:
                    self._store(entry, rank, content)
        except (LorryError, StaleClaim, OSError) as error:
            log.warning("The output of the trainer for %s is not stored: %s", entry.claim.job.id, error)

    def _store(self, entry: _OpenLog, rank: int, content: bytes) -> None:
        blob: Blob = self._context.store.put_bytes(content)
        if entry.pushed.get(rank) != blob.digest:
            number = self._first_rank + rank
            job_logs.record(
                self._context.db, entry.claim.claim_id, worker_id=entry.worker_id, rank=number, content=blob
            )
            entry.pushed[rank] = blob.digest


def publishable(file: LogFile, start: int, claim: Claim, data_dir: Path) -> bytes:
    """Return at most job_logs.MAX_BYTES of the output since `start`: its first and last lines, without secrets, names
    of other jobs and paths of this machine."""
    end = file.end()
    tail_bytes = job_logs.MAX_BYTES - HEAD_BYTES - 100  # minus the line about the omitted bytes
    if end - start <= HEAD_BYTES + tail_bytes:
        return _bounded("\n".join(_clean(file.read(start, end), claim, data_dir)))
    head = file.read(start, start + HEAD_BYTES).rpartition(b"\n")[0]
    tail = file.read(end - tail_bytes, end).partition(b"\n")[2]
    omission = f"[{end - start - len(head) - len(tail)} bytes are omitted here]"
    return _bounded("\n".join([*_clean(head, claim, data_dir), omission, *_clean(tail, claim, data_dir)]))


def cleaned(end: End, claim: Claim, data_dir: Path) -> End:
    """Return `end` without secrets and names of other jobs, because all jobs of a trainer may get its last error."""

    def clean(text: str) -> str:
        return "\n".join(_clean(text.encode(), claim, data_dir))

    error = end.error and {name: clean(text) if isinstance(text, str) else text for name, text in end.error.items()}
    return replace(end, detail=clean(end.detail), error=error)


def _bounded(text: str) -> bytes:
    """Return complete lines only, within job_logs.MAX_BYTES. Cleaning may have made the text longer."""
    content = text.encode()
    if len(content) > job_logs.MAX_BYTES - 1:
        content = content[: job_logs.MAX_BYTES - 1].rpartition(b"\n")[0]
    return content + b"\n" if content else b""


def _clean(content: bytes, claim: Claim, data_dir: Path) -> Iterator[str]:
    text = content.decode("utf-8", "replace")
    for secret in _secrets():
        text = text.replace(secret, "…")
    text = logs.redact(text.replace(str(data_dir.absolute()), "$LORRY_DATA_DIR"))
    own = tuple(ident for ident in (claim.claim_id, claim.job.id, claim.job.trainer_id) if ident)
    text = ANY_ID.sub(lambda found: found[0] if found[0].endswith(own) else "…", text)
    parent = JobSpec.model_validate(claim.job.spec).parent
    own_names = (claim.job.id[-8:],) if parent is None else (claim.job.id[-8:], parent.name)
    text = NAMES.sub(lambda found: found[0] if found[0].rstrip(".,:;)").endswith(own_names) else "ft:…", text)
    for line in text.removesuffix("\n").split("\n") if text else ():
        drawn_last = line.rstrip("\r").rpartition("\r")[2]  # the final state of a progress bar
        yield CONTROL.sub("", drawn_last)[:LONGEST_LINE]


def _secrets() -> list[str]:
    """Return the values of environment variables that are secret by their name, or may contain a secret. Longest
    first."""
    named = (value for name, value in os.environ.items() if SECRET_NAMES.search(name))
    return sorted((value for value in named if len(value) >= SHORTEST_SECRET), key=len, reverse=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _part(path: Path, start: int, end: int) -> bytes:
    start = max(0, start)
    if end <= start:
        return b""
    try:
        with os.fdopen(open_file(path), "rb") as file:
            file.seek(start)
            return file.read(end - start)
    except OSError:
        return b""
