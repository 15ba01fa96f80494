"""What the kernel lets this process's group have of the machine's memory, and whom of it it has killed; both versions.

A container sees its own group as the root. Elsewhere, as under systemd, it lies where /proc/self/cgroup says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """Of the files of one version."""

    controller: str
    """As /proc/self/cgroup names it."""
    folder: str
    limit: str
    used: str
    reclaimable: str
    """In memory.stat: page cache that the kernel gives back when memory is wanted, which counts as used."""
    events: str


VERSIONS = (
    Names(
        controller="",
        folder="",
        limit="memory.max",
        used="memory.current",
        reclaimable="inactive_file",
        events="memory.events",
    ),
    Names(
        controller="memory",
        folder="memory",
        limit="memory.limit_in_bytes",
        used="memory.usage_in_bytes",
        reclaimable="total_inactive_file",
        events="memory.oom_control",
    ),
)


def free_bytes() -> int | None:
    """What the group may still take, by its own limit and those of the groups that it lies in; None where nothing
    limits it."""
    names = _found()[1]
    return min((free for group in _groups() if (free := _free_bytes(group, names)) is not None), default=None)


def _free_bytes(folder: Path, names: Names) -> int | None:
    limit = _number(folder / names.limit)
    if limit is None:
        return None
    used = (_number(folder / names.used) or 0) - (_entry(folder / "memory.stat", names.reclaimable) or 0)
    return max(0, limit - used)


def limit_bytes() -> int | None:
    """What the group may take in all, by the least of the same limits; None where nothing limits it."""
    names = _found()[1]
    return min((limit for group in _groups() if (limit := _number(group / names.limit)) is not None), default=None)


def oom_kills() -> int:
    """How many of its processes the kernel has killed for want of memory, so far."""
    folder, names = _found()
    return _entry(folder / names.events, "oom_kill") or 0


def _groups() -> list[Path]:
    """Its own folder, and those of the groups that it lies in."""
    folder, names = _found()
    top = ROOT / names.folder
    return [folder, *(above for above in folder.parents if above == top or top in above.parents)]


def _found() -> tuple[Path, Names]:
    """The group's folder, and how its files are named; where nothing tells, those of the second version's root."""
    return _looked_up(ROOT, OWN)


@cache
def _looked_up(root: Path, own: Path) -> tuple[Path, Names]:
    paths = _paths(own)
    for names in VERSIONS:
        of_version = root / names.folder
        for folder in (of_version / paths.get(names.controller, "").lstrip("/"), of_version):
            if (folder / names.events).exists():
                return folder, names
    return root, VERSIONS[0]


def _paths(own: Path) -> dict[str, str]:
    """By controller, the group within its tree; the second version's tree has all and names none."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return {}
    return {controller: path for _, controllers, path in lines for controller in controllers.split(",")}


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _entry(path: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name} (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
