"""How much memory a process takes, as Linux tells; all results in bytes."""

from __future__ import annotations

import re
from pathlib import Path


def memory(field: str, pid: int | str = "self") -> int:
    """A field of /proc/PID/status: VmRSS is what it has now, VmHWM the most that it had."""
    return _field(Path(f"/proc/{pid}/status"), field)


def proportional_bytes(pid: int | str = "self") -> int:
    """Its memory with pages that n processes share counted as an n-th, so that sums over processes are right."""
    return _field(Path(f"/proc/{pid}/smaps_rollup"), "Pss")


def _field(path: Path, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    assert found, "this comparison needs Linux"
    return int(found[1]) * 1024
