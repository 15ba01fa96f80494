"""Memory of a process as Linux reports it, in bytes."""

from __future__ import annotations

import re
from pathlib import Path


def memory(field: str, pid: int | str = "self") -> int:
    """Return a field of /proc/PID/status: VmRSS is the current size, VmHWM the peak."""
    return _field(Path(f"/proc/{pid}/status"), field)


def proportional_bytes() -> int:
    """Return this process's proportional set size: a page of n processes counts as 1/n, so sums are correct."""
    return _field(Path("/proc/self/smaps_rollup"), "Pss")


def _field(path: Path, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    assert found, "this comparison needs Linux"
    return int(found[1]) * 1024
