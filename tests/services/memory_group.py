"""A group of processes that the kernel holds to so much memory, by whichever version this machine has."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.services.programs import Missing
from worker.node import cgroup

GONE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryGroup:
    folder: Path
    names: cgroup.Names

    def argv(self, argv: list[str]) -> list[str]:
        """The same command, within the group."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *argv]

    def used_bytes(self) -> int:
        return int((self.folder / self.names.used).read_text())

    def limit(self, num_bytes: int | None) -> None:
        """None: no more."""
        unlimited = "max" if self.names.limit == "memory.max" else "-1"
        (self.folder / self.names.limit).write_text(unlimited if num_bytes is None else str(num_bytes))


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """Empty; its processes must have ended by the end of the block. Raises Missing where none may be made."""
    name, found = f"lorry-test-{secrets.token_hex(4)}", None
    for names in cgroup.VERSIONS:
        folder = cgroup.ROOT / names.folder / name
        with suppress(OSError):
            folder.mkdir()
            if (folder / names.limit).exists():
                found = MemoryGroup(folder=folder, names=names)
                break
            folder.rmdir()
    if found is None or os.geteuid() != 0:
        raise Missing("only root may make a memory cgroup, and where the machine has that controller")
    try:
        yield found
    finally:
        _remove(found.folder)


def _remove(folder: Path) -> None:
    """Once its last process is gone, which is not yet so when that has been waited for."""
    deadline = time.monotonic() + GONE_SECONDS
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
