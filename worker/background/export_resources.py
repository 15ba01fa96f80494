"""Whether a worker has the disk space and the memory that an export needs, checked before its work starts."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

from catalog.errors import LorryError
from catalog.exports.formats import Needs
from catalog.resources.memory import readable
from worker.node import devices


class ScarceResources(LorryError):
    """This worker has too little free disk space or memory for the export. Another one may have enough."""


def check(needs: Needs, *, worker_id: str, scratch: Path, store: Path | None, adapter_bytes: int) -> None:
    """Raises ScarceResources.

    scratch: an existing folder in which the export is written, next to a copy of the adapter. store: the folder of the
    artifact store; None if it is a bucket.
    """
    needed: dict[int, int] = defaultdict(int)
    folders: dict[int, list[Path]] = defaultdict(list)
    for folder, num_bytes in ((scratch, adapter_bytes + needs.scratch_bytes), (store, needs.stored_bytes)):
        if folder is not None and num_bytes:
            device = folder.stat().st_dev
            needed[device] += num_bytes
            folders[device].append(folder)
    for device, num_bytes in needed.items():
        free = shutil.disk_usage(folders[device][0]).free
        if free < num_bytes:
            raise _too_little_space(worker_id, folders[device], needed=num_bytes, free=free)
    free = devices.free_host_bytes()
    if free < needs.memory_bytes:
        raise ScarceResources(
            f"The export needs about {readable(needs.memory_bytes)} of memory, but worker {worker_id} has only "
            f"{readable(free)} free.",
            code="export_memory",
            remedy="Wait until jobs on that machine finish, or use a worker with more memory. Then create the export "
            "again.",
        )


def _too_little_space(worker_id: str, folders: list[Path], *, needed: int, free: int) -> ScarceResources:
    named = " and ".join(map(str, folders))
    return ScarceResources(
        f"The export needs about {readable(needed)} of disk space in {named}, but worker {worker_id} has only "
        f"{readable(free)} free there.",
        code="out_of_space",
        remedy="Free up space on that disk. Then create the export again.",
    )
