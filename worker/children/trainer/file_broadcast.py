"""Connects the processes of a trainer on several machines, and copies files between them. Runs in the trainer only.

The leader's worker provides the files of a job, and its trainer broadcasts them. Therefore all nodes have the same
bytes, and no job is admitted before every node has them. On one machine there is nothing to do.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import Literal, TypeVar

from lora_core.distributed.ranks import Ranks, Rendezvous
from worker.protocol.mailbox import AdmitBody, TrainerDirectory
from worker.protocol.rendezvous import report_port, reported_port
from worker.protocol.trainer_paths import UnsafePath, confined

NAMES: tuple[Literal["train", "valid", "resume", "parent"], ...] = ("train", "valid", "resume", "parent")
"""The fields of an `admit` message that name a file or a folder."""
CHUNK_BYTES = 16 * 2**20
RENDEZVOUS_SECONDS = 300.0
"""Time limit for the trainers to connect to each other."""
POLL_SECONDS = 0.05
T = TypeVar("T")


def rendezvous_of(directory: TrainerDirectory) -> Rendezvous | None:
    """Return how this trainer connects to those of other machines. None if there are none."""
    settings = directory.settings().get("meeting")
    if settings is None:
        return None

    def port() -> int:
        deadline = time.monotonic() + RENDEZVOUS_SECONDS
        while (found := settings["port"] or reported_port(directory)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError("The first process of this trainer does not listen.")
            time.sleep(POLL_SECONDS)
        return int(found)

    return Rendezvous(
        address=settings["address"],
        interface=settings["interface"],
        port=port,
        report_port=lambda port: report_port(directory, port),
        name=settings["name"],
        first_rank=settings["first_rank"],
        num_ranks=settings["num_ranks"],
        seconds=RENDEZVOUS_SECONDS,
    )


class _End:
    """A machine's end of a transfer. After an error it does nothing more, but the transfer continues, so that the other
    machines don't wait forever."""

    def __init__(self) -> None:
        self.problem: OSError | None = None

    def attempt(self, act: Callable[[], T]) -> T | None:
        if self.problem is None:
            try:
                return act()
            except OSError as error:
                self.problem = error
        return None


def receive_files(directory: TrainerDirectory, body: AdmitBody, ranks: Ranks) -> list[Path | None]:
    """Return, on every rank, the paths of NAMES in a job's admission, after the files have been copied. Raises OSError
    and LoraCoreError, on all ranks."""
    if ranks.is_multi_node:
        _broadcast_all(directory, body, ranks)
    return [directory.inside(body[name]) for name in NAMES]


def forget(directory: TrainerDirectory, claim_id: str, ranks: Ranks) -> None:
    """Delete the copies of a job's files after the job has left. The leader's worker deletes the leader's files."""
    if ranks.is_first_elsewhere:
        shutil.rmtree(directory.job_path(claim_id), ignore_errors=True)


def _broadcast_all(directory: TrainerDirectory, body: AdmitBody, ranks: Ranks) -> None:
    found = ranks.broadcast(ranks.by_leader(lambda: _files(directory, body)))
    end = _End()
    for name, num_bytes in found:
        _broadcast_file(directory.path, name, num_bytes, ranks, end)
    with ranks.sharing_errors():
        if end.problem is not None:
            raise end.problem


def _files(directory: TrainerDirectory, body: AdmitBody) -> list[tuple[str, int]]:
    """Return the relative name and the size in bytes of each file."""
    named = [path for name in NAMES if (path := directory.inside(body[name])) is not None]
    paths = [file for path in named for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [(directory.named(path), path.stat().st_size) for path in paths if path.is_file()]


def _broadcast_file(folder: Path, name: str, num_bytes: int, ranks: Ranks, end: _End) -> None:
    is_end = ranks.leads or ranks.is_first_elsewhere
    file = end.attempt(lambda: _opened(folder, name, is_source=ranks.leads)) if is_end else None
    for start in range(0, num_bytes, CHUNK_BYTES):
        content = bytearray(min(CHUNK_BYTES, num_bytes - start))
        if file is not None and ranks.leads:
            end.attempt(partial(file.readinto, content))
        ranks.broadcast_bytes(content)
        if file is not None and not ranks.leads:
            end.attempt(partial(file.write, content))
    if file is not None:
        end.attempt(file.close)


def _opened(folder: Path, name: str, *, is_source: bool) -> BufferedIOBase:
    try:
        path = confined(folder, name)
    except UnsafePath as error:
        raise OSError(error.message) from error
    if is_source:
        return path.open("rb")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")
