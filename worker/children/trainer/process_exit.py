"""How a trainer's process ends where something is raised that nobody has thought of: at once, with all the others.

Runs in the trainer alone.
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
from lora_core.distributed.ranks import Meeting, Ranks
from worker.process.exit_status import DISK_FULL

SILENCE_SECONDS = 3600.0
"""For which a rank waits for another, who may be verifying an adapter. Our parent notices a hang sooner."""


@contextmanager
def joined(device: str, *, meeting: Meeting | None = None, file: Path | None = None) -> Generator[Ranks]:
    """The ranks that this process was launched among, and those of other machines where it meets them, for as long as
    the block lasts. file: as of `distributed.join`.

    Of several one that fails doesn't wait at its end for threads and devices in which the others wait for it. A full
    disk is told by the exit status, for there may be no room for words.
    """
    ranks = distributed.join(device, silence_seconds=SILENCE_SECONDS, meeting=meeting, file=file)
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
    distributed.leave()


def _is_of_full_disk(error: BaseException | None) -> bool:
    """It, or what it was raised for."""
    while error is not None:
        if isinstance(error, OSError) and is_full(error):
            return True
        error = error.__cause__
    return False
