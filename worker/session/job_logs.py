"""What a trainer prints, kept for each job that it holds: from when the job came to it until the job leaves.

A trainer's processes write to files in its directory, which are cut where they grow long. What goes to the store is
bounded, and holds no secret of the worker and no name of another's job: a trainer may hold several projects' jobs. Nor
does what is recorded of how it ended.
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
"""A longer one is cut; as much again is kept of what was before."""
HEAD_BYTES = job_logs.MAX_BYTES // 4
LONGEST_LINE = 4000
"""In letters."""
PUSH_SECONDS = 60.0
"""Between two looks at what there is to tell of a job that goes on."""
SECRET_NAMES = re.compile(rf"{CREDENTIAL_NAMES.pattern}|_URL$|_URI$")
SHORTEST_SECRET = 8
NAMES = re.compile(r"\bft:[^\s'\"]+")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|\x1b\[[0-9;]*[A-Za-z]")


class LogFile:
    """One process's file. Its places are counted from its first byte, be that cut away or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before = cut_from(path)
        self._num_cut = 0
        self._is_reported = False

    def end(self) -> int:
        return self._num_cut + _size(self.path)

    def keep_short(self) -> None:
        """Cut it where it is long. Its process appends, so it goes on at the new end; what it writes in this very
        moment may be lost. Where the disk is full it stays as it is, and what was before goes."""
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
            log.warning("What a trainer prints is long and can't be cut: %s", error)
        self._is_reported = True

    def read(self, start: int, end: int) -> bytes:
        """What is still there of it."""
        first = self._num_cut - _size(self._before)
        before = _part(self._before, start - first, min(end, self._num_cut) - first)
        return before + _part(self.path, start - self._num_cut, end - self._num_cut)


class LogFiles:
    """Of all processes of a trainer, by rank; more may come."""

    def __init__(self, directory: TrainerDirectory) -> None:
        self._directory = directory
        self._files: dict[int, LogFile] = {}

    def found(self) -> dict[int, LogFile]:
        """Those of before, where the folder can't be read now."""
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
    """Whose claim it is."""
    begins_at: Mapping[int, int]
    """By process. Of one that comes later: at its first byte."""
    pushed: dict[int, str] = field(default_factory=dict[int, str])
    """Digest of what was stored last, by process."""


class Output:
    """Of one trainer, for as long as its session lasts."""

    def __init__(self, context: WorkerContext, directory: TrainerDirectory, *, first_rank: int = 0) -> None:
        """first_rank: of the processes here, where others are on other nodes."""
        self._context = context
        self._first_rank = first_rank
        self._directory = directory
        self._files = LogFiles(directory)
        self._open: dict[str, _OpenLog] = {}
        self._due_at = time.monotonic() + PUSH_SECONDS

    def begin(self, claim: Claim, *, is_loading: bool) -> None:
        """is_loading: the trainer loads its base for this job, so what it printed since it began is of the job too."""
        begins_at = self._directory.log_starts if is_loading else self.ends()
        self.begin_at(claim, begins_at, worker_id=self._context.worker_id)

    def begin_at(self, claim: Claim, begins_at: Mapping[int, int], *, worker_id: str) -> None:
        """begins_at: of each process's file the first byte that is the job's. worker_id: whose claim it is."""
        self._open[claim.claim_id] = _OpenLog(claim=claim, worker_id=worker_id, begins_at=begins_at)

    def ends(self) -> dict[int, int]:
        """Where each process's file ends now."""
        return {rank: file.end() for rank, file in self._files.found().items()}

    def push_due(self) -> None:
        """Now and then: cut what is long, and store what is new of each job."""
        if time.monotonic() < self._due_at:
            return
        self._due_at = time.monotonic() + PUSH_SECONDS
        for entry in self._open.values():
            self._push(entry)
        self._files.keep_short()

    def end(self, claim_id: str) -> None:
        """The job leaves the trainer."""
        if (entry := self._open.pop(claim_id, None)) is not None:
            self._push(entry)

    def drop(self, claim_id: str) -> None:
        """The job is another worker's now: nothing is written of it any more."""
        self._open.pop(claim_id, None)

    def _push(self, entry: _OpenLog) -> None:
        """Best effort: nobody's training, and no end of an attempt, waits for it."""
        try:
            for rank, file in self._files.found().items():
                content = publishable(file, entry.begins_at.get(rank, 0), entry.claim, self._context.settings.data_dir)
                if content:
                    self._store(entry, rank, content)
        except (LorryError, StaleClaim, OSError) as error:
            log.warning("What the trainer printed for %s is not kept: %s", entry.claim.job.id, error)

    def _store(self, entry: _OpenLog, rank: int, content: bytes) -> None:
        blob: Blob = self._context.store.put_bytes(content)
        if entry.pushed.get(rank) != blob.digest:
            number = self._first_rank + rank
            job_logs.record(
                self._context.db, entry.claim.claim_id, worker_id=entry.worker_id, rank=number, content=blob
            )
            entry.pushed[rank] = blob.digest


def publishable(file: LogFile, start: int, claim: Claim, data_dir: Path) -> bytes:
    """At most job_logs.MAX_BYTES of what was printed since `start`: its first lines and its last, of which none holds a
    secret, another job's name or this machine's paths."""
    end = file.end()
    tail_bytes = job_logs.MAX_BYTES - HEAD_BYTES - 100  # and the line that tells what is left out
    if end - start <= HEAD_BYTES + tail_bytes:
        return _bounded("\n".join(_clean(file.read(start, end), claim, data_dir)))
    head = file.read(start, start + HEAD_BYTES).rpartition(b"\n")[0]
    tail = file.read(end - tail_bytes, end).partition(b"\n")[2]
    left_out = f"[{end - start - len(head) - len(tail)} bytes are left out here]"
    return _bounded("\n".join([*_clean(head, claim, data_dir), left_out, *_clean(tail, claim, data_dir)]))


def cleaned(end: End, claim: Claim, data_dir: Path) -> End:
    """`end` as the job's record may have it: what a trainer said last is told to all that it held."""

    def clean(text: str) -> str:
        return "\n".join(_clean(text.encode(), claim, data_dir))

    error = end.error and {name: clean(text) if isinstance(text, str) else text for name, text in end.error.items()}
    return replace(end, detail=clean(end.detail), error=error)


def _bounded(text: str) -> bytes:
    """Whole lines, and a last one that ends. What cleaning made longer is cut at the end."""
    content = text.encode()
    if len(content) > job_logs.MAX_BYTES - 1:
        content = content[: job_logs.MAX_BYTES - 1].rpartition(b"\n")[0]
    return content + b"\n" if content else b""


def _clean(content: bytes, claim: Claim, data_dir: Path) -> Iterator[str]:
    text = content.decode("utf-8", "replace")
    for secret in _secrets():
        text = text.replace(secret, "…")
    text = logs.redact(text.replace(str(data_dir.absolute()), "$LORRY_DATA_DIR"))
    own = (claim.claim_id, claim.job.id)
    text = ANY_ID.sub(lambda found: found[0] if found[0].endswith(own) else "…", text)
    parent = JobSpec.model_validate(claim.job.spec).parent
    own_names = (claim.job.id[-8:],) if parent is None else (claim.job.id[-8:], parent.name)
    text = NAMES.sub(lambda found: found[0] if found[0].rstrip(".,:;)").endswith(own_names) else "ft:…", text)
    for line in text.removesuffix("\n").split("\n") if text else ():
        drawn_last = line.rstrip("\r").rpartition("\r")[2]  # of a progress bar
        yield CONTROL.sub("", drawn_last)[:LONGEST_LINE]


def _secrets() -> list[str]:
    """Values of this process's environment by whose names they are secret, or may hold one. Longest first."""
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
