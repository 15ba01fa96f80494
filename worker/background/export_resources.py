"""Checks that a worker has the disk space and memory for an export, before it takes the export."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

from catalog.errors import LorryError, listed
from catalog.exports.formats import Needs
from catalog.resources.memory import readable
from worker.node import devices


class ScarceResources(LorryError):
    """This worker lacks disk space, memory or a program for the export. Another one may have it."""


def check(needs: Needs, *, worker_id: str, scratch: Path, store: Path | None, adapter_bytes: int) -> None:
    """Raises ScarceResources.

    scratch: an existing folder in which the export is written, next to a copy of the adapter. store: the folder of the
    artifact store; None if it is a bucket.
    """
    uses = [("scratch files", scratch, adapter_bytes + needs.scratch_bytes)]
    if store is not None:
        uses.append(("the artifact store", store, needs.stored_bytes))
    by_device: dict[int, list[tuple[str, Path, int]]] = defaultdict(list)
    for use in uses:
        by_device[use[1].stat().st_dev].append(use)
    for on_device in by_device.values():
        needed, free = sum(num_bytes for _, _, num_bytes in on_device), shutil.disk_usage(on_device[0][1]).free
        if free < needed:
            raise _too_little_space(worker_id, [name for name, _, _ in on_device], needed=needed, free=free)
    free = devices.free_host_bytes()
    if free < needs.memory_bytes:
        raise ScarceResources(
            "export_memory", memory_bytes=readable(needs.memory_bytes), worker_id=worker_id, free=readable(free)
        )


def _too_little_space(worker_id: str, uses: list[str], *, needed: int, free: int) -> ScarceResources:
    """The message names no path, because users of any project may read it."""
    return ScarceResources(
        "export_out_of_space", needed=readable(needed), uses=listed(uses), worker_id=worker_id, free=readable(free)
    )
