"""Exits a trainer's process on an unexpected error: at once, and together with all other processes.

Runs only in the trainer.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from catalog.disk import is_full
from lora_core.distributed import ranks as distributed
from lora_core.distributed.failure_broadcast import broadcast_failures
from lora_core.distributed.ranks import Ranks, Rendezvous
from worker.process.exit_status import DISK_FULL

SILENCE_SECONDS = 3600.0
"""Time limit of a rank that waits for another one, which may be verifying an adapter. The worker detects a hang
earlier."""


@contextmanager
def joined(device: str, *, rendezvous: Rendezvous | None = None, file: Path | None = None) -> Generator[Ranks]:
    """Yield the ranks of this process's launch, joined with those of other machines if there are any, for the duration
    of the block. file: see `distributed.join`. One of several ranks exits at the end of the block.

    If one of several ranks fails, it exits without waiting for threads and devices that may themselves wait for other
    ranks. The exit status reports a full disk, because there may be no space for a message.
    """
    ranks = distributed.join(device, silence_seconds=SILENCE_SECONDS, rendezvous=rendezvous, file=file)
    try:
        with broadcast_failures(ranks):
            yield ranks
    except Exception as error:
        status = DISK_FULL if _is_of_full_disk(error) else 1
        with suppress(OSError):
            traceback.print_exc()
            sys.stderr.flush()
        if ranks.size == 1:
            raise SystemExit(status) from error
        os._exit(status)
    if ranks.size > 1:
        distributed.end_process()


def _is_of_full_disk(error: BaseException | None) -> bool:
    """Return whether the error, or one of its causes, is a full disk."""
    while error is not None:
        if isinstance(error, OSError) and is_full(error):
            return True
        error = error.__cause__
    return False
