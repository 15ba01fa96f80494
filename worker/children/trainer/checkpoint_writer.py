"""Writes checkpoints in a thread while the jobs train on.

A snapshot is copied to the host between two ticks. The thread then needs only the host: it writes and synchronizes the
files, and computes their digests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from catalog import failpoints
from lora_core.engine.checkpoint import CheckpointSnapshot
from lora_core.peft_format.export import AdapterSnapshot
from lora_core.runtime.transfers import release_pinned_memory
from worker.protocol.mailbox import Json, timed

FREE_TIMES = 4
"""Free host memory that a further snapshot needs, as a multiple of its size. Equal jobs that began together are due at
the same step, and training would stop until most of them are written."""


def writes_while_training(device: str) -> bool:
    """Return whether checkpoints are written in the thread. On a CPU it would take its time from training."""
    return device.startswith("cuda")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFiles:
    """The folders of one checkpoint, which don't exist before."""

    claim_id: str
    step: int
    folder: Path
    adapter_folder: Path
    """For the same weights in PEFT's layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointDraft:
    """A checkpoint that is to be written. `adapter` is None if it has other weights than the checkpoint."""

    files: CheckpointFiles
    checkpoint: CheckpointSnapshot
    adapter: AdapterSnapshot | None
    began_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenCheckpoint:
    """The outcome of writing one checkpoint."""

    files: CheckpointFiles
    error: OSError | None = None
    """Why there is no checkpoint."""
    num_parameters: int | None = None
    """Trained parameters of the adapter; None if no adapter was written."""
    adapter_error: OSError | None = None
    spans: tuple[Json, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    claim_id: str
    step: int
    num_bytes: int
    outcome: Future[WrittenCheckpoint]


class CheckpointWriter:
    """Writes checkpoints in the order of `begin`. The other methods return outcomes, each once and in that order.

    Of several ranks, the leader writes. The writers of the others have nothing to do. Only the thread that trains may
    call it. The methods that wait raise unexpected errors of the writing thread.
    """

    def __init__(self, *, free_host_bytes: Callable[[], int]) -> None:
        """free_host_bytes: returns the free memory of this machine."""
        self._free_host_bytes = free_host_bytes
        self._pending: deque[_Pending] = deque()
        self._largest_bytes = 0
        """Most bytes of snapshots at one time. torch keeps this pinned memory for later ones, until it is released."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")

    def begin(self, draft: CheckpointDraft, *, num_bytes: int) -> None:
        """Write a checkpoint in the thread. `make_room` of `num_bytes` before the snapshots are taken."""
        files, outcome = draft.files, self._thread.submit(written, draft)
        self._pending.append(_Pending(claim_id=files.claim_id, step=files.step, num_bytes=num_bytes, outcome=outcome))
        self._largest_bytes = max(self._largest_bytes, self._pending_bytes())

    def has_unwritten(self, claim_id: str, step: int) -> bool:
        """Return whether the job's checkpoint of that step has begun, and its outcome was not returned yet."""
        return any((pending.claim_id, pending.step) == (claim_id, step) for pending in self._pending)

    def discard(self, claim_id: str) -> None:
        """Drop the job's checkpoints whose writing has not begun."""
        self._pending = deque(
            pending for pending in self._pending if pending.claim_id != claim_id or not pending.outcome.cancel()
        )

    def completed(self) -> Iterator[WrittenCheckpoint]:
        """Return the outcomes that are known, without waiting.

        An unexpected error is left to the methods that wait. This method is also called while another job is exported,
        to which the error would be attributed.
        """
        while self._pending and self._pending[0].outcome.done() and self._pending[0].outcome.exception() is None:
            yield self._pending.popleft().outcome.result()

    def make_room(self, num_bytes: int) -> Iterator[WrittenCheckpoint]:
        """Wait until there is memory for one more snapshot of that size."""
        yield from self.completed()
        if self._free_host_bytes() < FREE_TIMES * num_bytes:
            self.release_memory()  # it may have other sizes than this snapshot needs
        while self._pending and self._free_bytes() < FREE_TIMES * num_bytes:
            yield self._pending.popleft().outcome.result()

    def release_memory(self) -> None:
        """Return the memory of earlier snapshots to the system, where torch offers that."""
        if release_pinned_memory():
            self._largest_bytes = self._pending_bytes()

    def _free_bytes(self) -> int:
        """Return the free memory with what torch keeps of earlier snapshots."""
        return self._free_host_bytes() + self._largest_bytes - self._pending_bytes()

    def _pending_bytes(self) -> int:
        return sum(pending.num_bytes for pending in self._pending)

    def settle(self, claim_id: str) -> Iterator[WrittenCheckpoint]:
        """Wait until the job has no unwritten checkpoint."""
        while any(pending.claim_id == claim_id for pending in self._pending):
            yield self._pending.popleft().outcome.result()

    def close(self) -> Iterator[WrittenCheckpoint]:
        """Wait for all checkpoints, and end the thread."""
        while self._pending:
            yield self._pending.popleft().outcome.result()
        self._thread.shutdown()


def written(draft: CheckpointDraft) -> WrittenCheckpoint:
    """Write the files of a checkpoint. Errors of the disk are part of the outcome, and others are raised."""
    try:
        draft.checkpoint.write(draft.files.folder)
    except OSError as error:
        return WrittenCheckpoint(files=draft.files, error=error)
    num_parameters, adapter_error = None, None
    if draft.adapter is not None:
        try:
            num_parameters = draft.adapter.write(draft.files.adapter_folder).num_parameters
        except OSError as error:
            adapter_error = error
    failpoints.pass_by("in_checkpoint")
    return WrittenCheckpoint(
        files=draft.files,
        num_parameters=num_parameters,
        adapter_error=adapter_error,
        spans=(timed("checkpoint", draft.began_at),),
    )
