"""A control group that limits the memory of its processes, with the cgroup version of this machine."""

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
        """Return the command that runs `argv` within the group."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *argv]

    def used_bytes(self) -> int:
        return int((self.folder / self.names.used).read_text())

    def limit(self, num_bytes: int | None) -> None:
        """Limit the memory of the group. None removes the limit."""
        unlimited = "max" if self.names.limit == "memory.max" else "-1"
        (self.folder / self.names.limit).write_text(unlimited if num_bytes is None else str(num_bytes))


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """Create an empty memory group. Its processes must end within the block. Raises Missing if it cannot be created."""
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
        raise Missing("a memory cgroup needs root and a machine with the memory controller")
    try:
        yield found
    finally:
        _remove(found.folder)


def _remove(folder: Path) -> None:
    """Remove the group. Its last process may disappear a little after it was waited for, so this retries."""
    deadline = time.monotonic() + GONE_SECONDS
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
